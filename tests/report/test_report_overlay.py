"""What is drawn over an image of a manifest, and what is not let through."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from compress.report.overlay import read_overlay
from compress.report.png import png_size

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def header(width: int = 4, height: int = 2, *, bits: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


ROWS = bytes(13) * 2  # of 4 x 2 pixels in RGB
DATA, END = chunk(b"IDAT", zlib.compress(ROWS)), chunk(b"IEND")
GOOD = SIGNATURE + header() + DATA + END


def saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def entry(data: bytes = GOOD, **others: Any) -> dict[str, Any]:
    image = base64.b64encode(data).decode()
    return {"image": image, "rows": 2, "columns": 4, "kept": [0, 3]} | others


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (224, 224)])
def test_what_others_write_is_a_png(mode: str, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    data = saved(Image.fromarray(pixels).convert(mode))
    assert png_size(data, 224) == size
    assert (png_size(data, 7) is None) == (max(size) > 7)


def info(**texts: str) -> PngImagePlugin.PngInfo:
    found = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        found.add_text(name, text)
    return found


BAD = {
    "empty": b"",
    "a page": b"<svg onload=alert(1)>",
    "a GIF": b"GIF89a" + bytes(40),
    "signature alone": SIGNATURE,
    "cut": GOOD[:-1],
    "cut in a head": GOOD[:-5],
    "something behind": GOOD + b"<script>",
    "a byte behind": GOOD + b"\0",
    "a chunk behind": GOOD + chunk(b"tEXt", b"a\0b"),
    "a second end": GOOD + END,
    "no end": SIGNATURE + header() + DATA,
    "no data": SIGNATURE + header() + END,
    "data in the end": SIGNATURE + header() + DATA + chunk(b"IEND", b"x"),
    "the header twice": SIGNATURE + header() * 2 + DATA + END,
    "the header last": SIGNATURE + DATA + header() + END,
    "a wrong check sum": GOOD[:-1] + b"\0",
    "a text": saved(Image.new("RGB", (4, 2)), pnginfo=info(a="b")),
    "a profile": saved(Image.new("RGB", (4, 2)), icc_profile=b"profile"),
    "an animation": saved(
        Image.new("RGB", (4, 2)), save_all=True, append_images=[Image.new("RGB", (4, 2), "red")]
    ),
    "no pixels": SIGNATURE + header(0, 0) + chunk(b"IDAT", zlib.compress(b"")) + END,
    "no rows": SIGNATURE + header(4, 0) + chunk(b"IDAT", zlib.compress(b"")) + END,
    "16 bits": SIGNATURE + header(bits=16) + DATA + END,
    "4 bits of RGB": SIGNATURE + header(bits=4) + DATA + END,
    "an unknown colour": SIGNATURE + header(colour=7) + DATA + END,
    "no palette": SIGNATURE + header(12, colour=3) + DATA + END,
    "a palette of no use": SIGNATURE + header() + chunk(b"PLTE", b"abc") + DATA + END,
    "an empty palette": SIGNATURE + header(12, colour=3) + chunk(b"PLTE") + DATA + END,
    "an odd palette": SIGNATURE + header(12, colour=3) + chunk(b"PLTE", b"abcd") + DATA + END,
    "interlaced": SIGNATURE
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, 8, 2, 0, 0, 1))
    + DATA
    + END,
    "a short header": SIGNATURE + chunk(b"IHDR", bytes(12)) + DATA + END,
    "too few pixels": SIGNATURE + header(5) + DATA + END,
    "too many pixels": SIGNATURE + header(3) + DATA + END,
    "an unknown filter": SIGNATURE
    + header()
    + chunk(b"IDAT", zlib.compress(bytes(13) + b"\5" + bytes(12)))
    + END,
    "no deflate": SIGNATURE + header() + chunk(b"IDAT", ROWS) + END,
    "cut deflate": SIGNATURE + header() + chunk(b"IDAT", zlib.compress(ROWS)[:-2]) + END,
    "behind deflate": SIGNATURE + header() + chunk(b"IDAT", zlib.compress(ROWS) + b"x") + END,
    "a bomb": SIGNATURE + header() + chunk(b"IDAT", zlib.compress(bytes(1 << 27))) + END,
    "a wide one": saved(Image.new("1", (225, 1))),
    "a tall one": saved(Image.new("1", (1, 225))),
    "a long chunk": SIGNATURE + b"\xff\xff\xff\xffIHDR" + bytes(30),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_is_no_small_png_is_left_out(data: bytes) -> None:
    assert png_size(GOOD, 224) == (4, 2)
    assert png_size(data, 224) is None
    assert read_overlay(entry(data)) is None


def test_several_chunks_of_data_are_one() -> None:
    packed = zlib.compress(ROWS)
    parts = b"".join(chunk(b"IDAT", packed[i : i + 1]) for i in range(len(packed)))
    assert png_size(SIGNATURE + header() + parts + END, 224) == (4, 2)


@given(st.binary(max_size=60), st.integers(0, len(GOOD)), st.integers(0, len(GOOD)))
def test_any_bytes_can_be_looked_at(junk: bytes, start: int, stop: int) -> None:
    data = GOOD[:start] + junk + GOOD[stop:]
    assert png_size(data, 224) == ((4, 2) if data == GOOD else None)


def test_dropped_patches_are_under_a_veil() -> None:
    found = read_overlay(entry(kept=[1, 7, 4]))
    assert found is not None
    assert found.veil == "M0 0h1v1H0zM2 0h2v1H2zM1 1h2v1H1z"
    assert found.frames == "M1 0h1v1H1zM0 1h1v1H0zM3 1h1v1H3z"
    assert found.scale == "scale(1 1)"
    assert found.words() == (
        "3 of 8 patches stay; the others are darkened. They are, row by row: 1 2."
    )
    whole = read_overlay(entry(kept=[*range(8)]))
    assert whole is not None
    assert whole.veil == ""


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_veil_and_frames_share_the_patches(rows: int, columns: int, data: st.DataObject) -> None:
    patches = st.integers(0, rows * columns - 1)
    kept = data.draw(st.lists(patches, min_size=1, unique=True))
    found = read_overlay(entry(rows=rows, columns=columns, kept=kept))
    assert found is not None
    assert covered(found.frames, columns) == sorted(kept)
    assert covered(found.veil, columns) == sorted({*range(rows * columns)} - {*kept})


def covered(path: str, columns: int) -> list[int]:
    """The patches in the rectangles that a path is made of."""
    found = []
    for part in path.split("z")[:-1]:
        corner, size = part.removeprefix("M").split("h")
        column, row = map(int, corner.split())
        width = int(size.partition("v")[0])
        assert size == f"{width}v1H{column}"
        found += [row * columns + column + step for step in range(width)]
    return sorted(found)


@pytest.mark.parametrize(
    "odd",
    [
        {"image": None},
        {"image": 3},
        {"image": ["a"]},
        {"image": ""},
        {"image": "\u0661\u0662"},
        {"image": base64.b64encode(GOOD).decode() + "\n"},
        {"image": '"><script>alert(1)</script>'},
        {"image": base64.b64encode(GOOD).decode()[:-1]},
        {"image": "A" * 10_000_000},
        {"rows": 0},
        {"rows": -2},
        {"rows": 2.0},
        {"rows": True},
        {"columns": None},
        {"columns": "4"},
        {"rows": 129, "columns": 1},
        {"rows": 1 << 62},
        {"kept": None},
        {"kept": []},
        {"kept": {"0": 1}},
        {"kept": [0, 8]},
        {"kept": [0, -1]},
        {"kept": [0, 0]},
        {"kept": [0, "1"]},
        {"kept": [0, True]},
        {"kept": [[0]]},
        {"kept": [*range(8)] * 1_000_000},
    ],
    ids=lambda odd: str(odd)[:40],
)
def test_an_entry_of_another_kind_is_left_out(odd: dict[str, Any]) -> None:
    assert read_overlay(entry()) is not None
    assert read_overlay(entry(**odd)) is None


def test_a_small_image_may_not_take_much() -> None:
    padded = SIGNATURE + header() + DATA + chunk(b"IDAT") * 20_000 + END
    assert png_size(padded, 224) == (4, 2)
    assert read_overlay(entry(padded)) is None


def test_the_largest_is_not_large() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 4), dtype=np.uint8)
    data = saved(Image.fromarray(pixels), compress_level=0)
    found = read_overlay(entry(data, rows=128, columns=128, kept=[*range(0, 128 * 128, 2)]))
    assert found is not None
    assert len(found.image) < 300_000
    assert len(found.veil) < 160_000
    assert found.scale == "scale(1.75 1.75)"
