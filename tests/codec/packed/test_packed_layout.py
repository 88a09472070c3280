"""Headers, geometry and the rule that chooses a layout."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.codec.checksum import crc32c
from compress.codec.packed import LAYOUTS, Layout, choose, parse, plan
from compress.errors import BadInput, Corrupt

SIZES = st.integers(1, 20000)


def resealed(header: bytes, at: int, value: bytes) -> bytes:
    """The header with other bytes at an offset and the right checksum."""
    changed = header[:at] + value + header[at + len(value) : 124]
    return changed + struct.pack("<I", crc32c(changed))


@given(layout=st.sampled_from(LAYOUTS), rows=SIZES, cols=SIZES, measured=st.integers(0, 1 << 25))
def test_headers_come_back(layout: str, rows: int, cols: int, measured: int) -> None:
    made = plan(layout, "F16", rows, cols, measured)
    assert parse(made.pack(7)) == made
    assert Layout.from_ints(made.ints()) == made
    assert all(isinstance(number, int) for number in made.ints())
    sections = [made.table, made.index, made.low, made.codes]
    sections.insert(2 if layout == "dense" else 4, made.extra)
    assert sections == sorted(sections)
    assert all(offset % 16 == 0 for offset in (*sections, made.nbytes))


def test_the_header_is_laid_out_as_written() -> None:
    header = plan("fast", "F16", 33, 17, 3).pack(0xAABBCCDD)
    # index: 3 numbers; low plane: 2 row tiles x 2 groups x 512; ranks: half of it; 3 escapes.
    index, low = 128 + 16, 128 + 16 + 16
    codes, escapes = low + 2048, low + 3072
    fields = (33, 17, escapes + 16 + 16, low, codes, index, 128, escapes)
    body = b"EPPK" + bytes([1, 1, 1, 2]) + struct.pack("<2I6Q56xI", *fields, 0xAABBCCDD)
    assert header == body + struct.pack("<I", crc32c(body))


def test_tiles() -> None:
    made = plan("dense", "BF16", 33, 129, 0)
    assert (made.groups, made.row_tiles, made.col_tiles, made.tiles) == (9, 2, 2, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lies_are_found(layout: str) -> None:
    header = plan(layout, "BF16", 100, 300, 50).pack(0)
    lies = [(0, b"EPPX"), (5, b"\0"), (6, b"\3"), (7, b"\0"), (70, b"\1")]
    lies += [(8, struct.pack("<I", rows)) for rows in (0, 1, 129, 2**32 - 1)]
    lies += [(12, struct.pack("<I", cols)) for cols in (0, 1, 400, 2**32 - 1)]
    for at in range(16, 64, 8):
        value = struct.unpack_from("<Q", header, at)[0]
        lies += [(at, struct.pack("<Q", lie)) for lie in (0, value - 16, value + 8, 2**64 - 16)]
    for at, value in lies:
        # Only the size may be another one: what follows the codes then has another length.
        if at == 16 and value == struct.pack("<Q", plan(layout, "BF16", 100, 300, 50).nbytes - 16):
            continue
        with pytest.raises(Corrupt, match="^w: "):
            parse(resealed(header, at, value), "w")


def test_damaged_headers_are_found() -> None:
    header = plan("dense", "BF16", 3, 4, 1).pack(5)
    for bit in range(8 * len(header)):
        flipped = bytearray(header)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Corrupt, BadInput)):
            parse(bytes(flipped))
    for size in range(len(header)):
        with pytest.raises(Corrupt, match="truncated"):
            parse(header[:size])


def test_newer_versions() -> None:
    header = plan("fast", "BF16", 3, 4, 0).pack(0)
    assert parse(resealed(header, 4, b"\2\1")).rows == 3
    with pytest.raises(BadInput, match="w: needs a reader of packed weights 2, .* upgrade"):
        parse(resealed(header, 4, b"\2\2"), "w")


@pytest.mark.parametrize(
    ("layout", "rows", "cols", "measured"),
    [
        ("fast", 1 << 31, 1, 0),
        ("fast", 1, 1 << 31, 0),
        ("fast", 1 << 17, 1 << 17, 1 << 31),
        ("dense", 1 << 18, 1 << 17, 0),
        ("dense", 32, 128, 1 << 31),
    ],
)
def test_too_large(layout: str, rows: int, cols: int, measured: int) -> None:
    with pytest.raises(BadInput, match=f"w: too large .* {rows} x {cols}.* 32 GiB"):
        plan(layout, "BF16", rows, cols, measured, "w")


@pytest.mark.parametrize(
    ("layout", "gpu"),
    [
        # GB/s, MHz, multiprocessors
        ("dense", (504, 2475, 46)),  # RTX 4070
        ("dense", (1008, 2520, 128)),  # RTX 4090
        ("dense", (864, 2520, 142)),  # L40S
        ("dense", (320, 1590, 40)),  # T4
        ("dense", (1792, 2407, 170)),  # RTX 5090
        ("fast", (2039, 1410, 108)),  # A100 80 GB
        ("fast", (3352, 1980, 132)),  # H100 SXM
        ("fast", (4800, 1980, 132)),  # H200
        ("fast", (8000, 1965, 148)),  # B200
    ],
)
def test_the_rule(layout: str, gpu: tuple[int, int, int]) -> None:
    assert choose(*gpu) == layout


def test_importing_is_light() -> None:
    script = "import sys, compress.codec.packed; print({'numpy', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
