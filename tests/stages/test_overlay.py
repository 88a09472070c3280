"""An image as a manifest holds it, and that reports take it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from compress.errors import BadInput
from compress.report.overlay import read_overlay
from compress.stages.overlay import picture


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I", "LA"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (224, 168)),
        ((224, 224), (224, 224)),
        ((30, 20), (30, 20)),
        ((1, 1), (1, 1)),
        ((5000, 3), (224, 1)),
    ],
)
def test_a_report_takes_any_image(
    mode: str, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    entry = picture(noise(*size, mode), [5, 0, 11], 3, 4)
    found = read_overlay(json.loads(json.dumps(entry)))
    assert found is not None
    assert (found.width, found.height) == expected
    assert (found.rows, found.columns, sorted(found.kept)) == (3, 4, [0, 5, 11])
    assert found.image == entry["image"]
    assert len(entry["image"]) < 75_000


def test_it_still_shows_the_image() -> None:
    image = Image.linear_gradient("L").resize((300, 300))
    entry = picture(image, [0], 1, 1)
    with Image.open(io.BytesIO(base64.b64decode(entry["image"]))) as shown:
        found = np.asarray(shown.convert("L"), dtype=float)
    small = np.asarray(image.resize(found.shape[::-1]), dtype=float)
    assert np.abs(found - small).max() < 4


def test_nothing_but_colours_is_taken_over_and_the_image_stays() -> None:
    image = noise(300, 200)
    before = image.tobytes()
    plain = picture(image, [1], 2, 2)
    told = image.copy()
    told.info |= {"icc_profile": b"profile", "dpi": (72, 72), "exif": b"secret", "gamma": 0.4}
    assert picture(told, [1, 1], 2, 2) == plain
    assert image.tobytes() == before


@pytest.mark.parametrize("kept", [[], [-1, 2], [0, 6]])
def test_patches_that_there_are_not(kept: Sequence[int]) -> None:
    with pytest.raises(BadInput, match=r"no patches of an image.*expected some of 0 to 5"):
        picture(noise(8, 8), kept, 2, 3)
