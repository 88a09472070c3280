"""How far a block turns the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cosine_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over tokens of ``1 - cos(x_i, y_i)``: block influence of ShortGPT (arXiv 2403.03853).

    ``x``, ``y``: a block's input and output, float32 [tokens, d]. Between 0 and 2.
    """
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(x, y, dim=1).double().mean().item()
