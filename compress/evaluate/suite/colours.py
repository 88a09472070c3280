"""The images of `entropress_colours`, drawn when they are asked for: nothing is stored.

Every pixel comes from integers of numpy's PCG64, so images are the same everywhere; Pillow only
wraps them.
"""

from __future__ import annotations

import random
from importlib import util
from typing import TYPE_CHECKING, Any

from compress.errors import Missing

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
}
SHAPES = ("square", "circle", "triangle")
SIDE = 224  # pixels
_CELL = SIDE // 2  # a shape lies in a quarter of the image


def load(count: int, seed: int, **_metadata: Any) -> dict[str, Dataset]:
    """``count`` documents as the split ``test``; lm-eval passes the task's metadata as well.

    Each is three shapes of three colours in three quarters of an image, and the shape whose colour
    is asked for. Shapes and colours are asked for equally often. Raises `Missing` without Pillow.
    """
    from datasets import Dataset

    if util.find_spec("PIL") is None:
        raise Missing(
            "Pillow is not installed",
            where="entropress_colours",
            mend="run: pip install 'entropress[vision]'",
        )
    return {"test": Dataset.from_list([_document(number, seed) for number in range(count)])}


def image(document: dict[str, Any]) -> list[Image]:
    """The one image of a document, RGB, `SIDE` pixels high and wide."""
    import numpy as np
    from PIL import Image

    draw = np.random.Generator(np.random.PCG64(document["seed"]))
    pixels = draw.integers(90, 166, (SIDE, SIDE, 3), dtype=np.uint8)  # grey noise
    for shape in document["shapes"]:
        size = int(draw.integers(56, 89))
        row, column = divmod(shape["quarter"], 2)
        top, left = (
            _CELL * place + int(draw.integers(4, _CELL - size - 3)) for place in (row, column)
        )
        window = pixels[top : top + size, left : left + size]
        window[_mask(shape["shape"], size)] = COLOURS[shape["colour"]]
    return [Image.fromarray(pixels)]


def _document(number: int, seed: int) -> dict[str, Any]:
    chance = random.Random(f"{seed} {number}")
    answer = list(COLOURS)[number % len(COLOURS)]
    asked = SHAPES[number % len(SHAPES)]
    others = chance.sample([colour for colour in COLOURS if colour != answer], 2)
    colours = {asked: answer} | dict(zip((s for s in SHAPES if s != asked), others, strict=True))
    quarters = chance.sample(range(4), len(SHAPES))
    return {
        "shape": asked,
        "answer": answer,
        "seed": chance.getrandbits(32),
        "shapes": [
            {"shape": shape, "colour": colours[shape], "quarter": quarter}
            for shape, quarter in zip(SHAPES, quarters, strict=True)
        ],
    }


def _mask(shape: str, size: int) -> Any:
    """Which pixels of a square belong to a shape that fills it, bool [size, size]."""
    import numpy as np

    y, x = np.mgrid[:size, :size]
    if shape == "circle":
        return (2 * y - size + 1) ** 2 + (2 * x - size + 1) ** 2 <= size**2
    if shape == "triangle":
        return abs(2 * x - size + 1) <= y
    return np.ones((size, size), bool)
