"""How much of a block's output the block itself added."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def norm_ratio(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over tokens of ``|y_i - x_i| / |y_i|``: a scorer in EvoPress (arXiv 2410.14649).

    ``x``, ``y``: a block's input and output, float32 [tokens, d]. The norm of a zero output counts
    as the smallest positive normal number.
    """
    import torch

    added = torch.linalg.vector_norm(y - x, dim=1)
    total = torch.linalg.vector_norm(y, dim=1).clamp_min(torch.finfo(y.dtype).tiny)
    return (added / total).double().mean().item()
