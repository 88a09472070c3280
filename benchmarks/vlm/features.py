"""What the frozen vision tower sees in the training images, computed once and kept in a file."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from task import Example, Split, examples

from compress.checkpoint import write_atomic


@dataclass(frozen=True, eq=False)
class Seen:
    """Of n images of p patches."""

    features: torch.Tensor
    """float16 [n, p, 384] of the vision layer that the projector reads."""
    answers: torch.Tensor
    """int64 [n]: the digits."""
    covered: torch.Tensor
    """float32 [n, p]: the share of each patch that the digit's square covers."""

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, which: torch.Tensor) -> Seen:
        return Seen(self.features[which], self.answers[which], self.covered[which])


def seen(
    model: Any, processor: Any, count: int, split: Split, path: Path, seed: int, batch: int = 32
) -> Seen:
    """The features of ``count`` examples, from the file if it has them."""
    size = processor.image_processor.crop_size["height"]
    layer = model.config.vision_feature_layer % (model.config.vision_config.num_hidden_layers + 1)
    path = path / f"{split}-{count}-{size}px-layer{layer}-seed{seed}.safetensors"
    if not path.exists():
        tower = _lower(model.model.vision_tower, layer)
        asked = list(examples(count, split, size=size, seed=seed))
        parts = []
        for first in range(0, count, batch):
            images = [one.image for one in asked[first : first + batch]]
            pixels = processor.image_processor(images=images, return_tensors="pt").pixel_values
            with torch.inference_mode():
                states = tower(pixels, output_hidden_states=True).hidden_states
            parts.append(states[layer][:, 1:].half())
        found = {
            "features": torch.cat(parts),
            "answers": torch.tensor([one.answer for one in asked]),
            "covered": torch.stack([_covered(one, processor.patch_size) for one in asked]),
        }
        write_atomic(path, save(found))
    return Seen(**load_file(path))


def _lower(tower: Any, layers: int) -> Any:
    """The tower's first layers: those above them do not change what these see."""
    lower = copy.deepcopy(tower)
    del lower.encoder.layer[layers:]
    return lower


def _covered(example: Example, patch: int) -> torch.Tensor:
    edges = torch.arange(0, example.image.shape[0], patch)
    top, left, side = example.box
    rows, columns = (
        (torch.clamp(edges + patch, max=start + side) - torch.clamp(edges, min=start)).clamp(min=0)
        for start in (top, left)
    )
    return torch.outer(rows, columns).flatten() / patch**2
