"""Weights that a module holds as parameters of its own: of a layer's experts, or GPT-2's `Conv1D`.

Experts of transformers 5.23 are 3-D parameters, ``gate_up_proj`` and ``down_proj``. Eager code
takes one expert after the other, and then only that one is decoded; ``grouped_mm`` and
``batched_mm`` take all of them, which are then decoded for the time of the product.
"""

from __future__ import annotations

import torch
from torch import nn

from compress.errors import BadInput
from compress.hf.packed.modules import Packed, Packing, install


class PackedParameters(Packed):
    """A module that computes as before, with views of packed weights in place of parameters."""


def packable(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that `adopt` takes."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return ["weight"]
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, weight in own if weight.dim() == 3 and weight.shape[0] > 1]


def adopt(module: nn.Module, weights: dict[str, tuple[torch.Tensor, list[int]]]) -> None:
    """Turn a module, in place, into one whose parameters ``weights`` are packed.

    ``weights``: packed tensor and ints, see `forms`, of names among `packable`. Backward passes
    keep what was decoded for the forward. Raises `BadInput` for other names, shapes or dtypes.
    """
    if other := sorted(weights.keys() - packable(module)):
        raise BadInput(f"a {type(module).__name__} cannot hold it packed", where=other[0])
    packings = {name: Packing(f"{name}_packed", ints, ()) for name, (_, ints) in weights.items()}
    buffers = [packed for packed, _ in weights.values()]
    install(module, PackedParameters, packings, buffers, exact="logits")
