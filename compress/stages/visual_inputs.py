"""Images and prompts to calibrate on, as a model's processor makes inputs of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.evaluate import load_processor

if TYPE_CHECKING:
    import torch

_MEND = 'a line is {"image": "PATH", "text": "PROMPT"}'


@dataclass(frozen=True)
class Pictured:
    """An image's file and what is said of it; the model's image token may stand in the text."""

    image: Path
    text: str


def read_examples(path: str) -> list[Pictured]:
    """The examples of a JSON-lines file; paths of images are relative to it.

    Raises `BadInput`, naming the line, for what is none and for images that are not there.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput("no such file", where=path, expected=_MEND)
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            stated = json.loads(line)
            image, text = stated["image"], stated["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput("is no example", where=where, got=repr(error), mend=_MEND) from None
        if not isinstance(image, str) or not isinstance(text, str):
            raise BadInput("is no example", where=where, mend=_MEND)
        if not (file.parent / image).is_file():
            raise BadInput("no such image", where=where, got=image)
        found.append(Pictured(file.parent / image, text))
    if not found:
        raise BadInput("holds no example", where=path, mend=_MEND)
    return found


def visual_inputs(
    checkpoint: Checkpoint, examples: list[Pictured]
) -> list[dict[str, torch.Tensor]]:
    """The model's inputs for each example, of one sequence each.

    Where the text has no image token, it goes before it. Raises as `load_processor`, and `BadInput`
    for an image that cannot be read.
    """
    processor = load_processor(checkpoint.path)
    from PIL import Image, UnidentifiedImageError

    token = str(getattr(processor, "image_token", "<image>"))
    inputs = []
    for example in examples:
        text = example.text if token in example.text else f"{token}\n{example.text}"
        try:
            with Image.open(example.image) as image:
                given = processor(images=image.convert("RGB"), text=text, return_tensors="pt")
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise BadInput("cannot be read", where=example.image, got=str(error)) from error
        inputs.append(dict(given))
    return inputs
