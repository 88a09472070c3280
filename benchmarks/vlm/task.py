"""The question that the assembled model learns, and how its answers are counted.

Which digit is in the image? Handwritten digits (1,797 scans of 8 x 8, of scikit-learn) are pasted,
enlarged and in any colours, at a random place of a crop of one of scikit-learn's two photographs.
The last 397 scans and the right halves of the photographs are held out: no training image shows a
pixel of either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

Split = Literal["train", "heldout"]

# The tokenizer makes of "Answer: 7" a token for the space and one for the digit.
PROMPT = "<image>\nWhich digit is in the image? Answer: "
DIGITS = [str(digit) for digit in range(10)]
HELD_OUT = 397
# Side of the pasted scan, in 112ths of the image's side.
SIDES = (40, 56)


@dataclass(frozen=True, eq=False)
class Example:
    """An image, what to ask of it, and what is right."""

    image: np.ndarray
    """uint8 [side, side, 3]."""
    prompt: str
    answer: int
    """Into `DIGITS`."""
    box: tuple[int, int, int]
    """Of the digit: top, left and side, in pixels."""


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """float32 [1797, 8, 8] of 0 to 1, and which digit each is."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target


@cache
def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def examples(count: int, split: Split, *, size: int = 112, seed: int = 0) -> Iterator[Example]:
    """``count`` examples of one split, images of ``size`` px; each scan once before any again.

    The i-th depends on the seed and i alone, not on the count.
    """
    scans, digits = _scans()
    here = np.arange(len(digits))[-HELD_OUT:] if split == "heldout" else np.arange(len(digits))
    here = here if split == "heldout" else here[:-HELD_OUT]
    for i in range(count):
        turn, place = divmod(i, len(here))
        order = np.random.default_rng([seed, turn]).permutation(here)
        number = order[place]
        image, box = _paint(scans[number], split, size, np.random.default_rng([seed, turn, place]))
        yield Example(image, PROMPT, int(digits[number]), box)


def _paint(
    scan: np.ndarray, split: Split, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int, int]]:
    canvas = _background(split, size, rng)
    side = round(rng.integers(SIDES[0], SIDES[1] + 1) * size / 112)
    top, left = rng.integers(0, size - side + 1, 2)
    ink, paper = _colours(rng)
    shape = _enlarged(scan, side)[..., None]
    canvas[top : top + side, left : left + side] = ink * shape + paper * (1 - shape)
    return canvas.round().astype(np.uint8), (int(top), int(left), side)


def _background(split: Split, size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [size, size, 3]: a square of 100 to 300 px of a photograph's half."""
    photograph = _photographs()[rng.integers(2)]
    half = photograph.shape[1] // 2
    photograph = photograph[:, :half] if split == "train" else photograph[:, half:]
    side = rng.integers(100, 301)
    top = rng.integers(photograph.shape[0] - side + 1)
    left = rng.integers(photograph.shape[1] - side + 1)
    return _resized(photograph[top : top + side, left : left + side], size).astype(np.float32)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of ink and paper, apart by at least 100 of 255 in brightness."""
    while True:
        ink, paper = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        if abs(ink.mean() - paper.mean()) >= 100:
            return ink, paper


def _enlarged(scan: np.ndarray, side: int) -> np.ndarray:
    return _resized((scan * 255).astype(np.uint8), side).astype(np.float32) / 255


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def log_likelihoods(
    model: Any, processor: Any, asked: list[Example], batch: int = 16
) -> torch.Tensor:
    """float32 [n, 10]: of each digit as the answer, among the ten."""
    import torch

    digits = processor.tokenizer.convert_tokens_to_ids(DIGITS)
    found = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        images, prompts = [one.image for one in part], [one.prompt for one in part]
        given = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**given.to(model.device), logits_to_keep=1).logits[:, -1, digits]
        found.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(found)


def accuracy(model: Any, processor: Any, asked: list[Example], batch: int = 16) -> list[bool]:
    """Of each example, whether the likeliest of the ten digits is the right one.

    The prompts are padded on the left where they differ in length. The model answers as it stands,
    so a context that prunes its tokens is entered around the call.
    """
    likeliest = log_likelihoods(model, processor, asked, batch).argmax(-1).tolist()
    return [found == one.answer for found, one in zip(likeliest, asked, strict=True)]
