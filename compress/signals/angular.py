"""The angle by which a block turns the residual stream."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def angular_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over tokens of ``arccos(cos(x_i, y_i)) / pi``, between 0 and 1 (arXiv 2403.17887).

    ``x``, ``y``: a block's input and output, float32 [tokens, d]. The paper looks at a sequence's
    last token alone; the mean over all of them varies less.
    """
    from torch.nn.functional import cosine_similarity

    # float64: near 1 the arccos of a float32 keeps half of its digits.
    cosines = cosine_similarity(x.double(), y.double(), dim=1).clamp(-1, 1)
    return cosines.acos().mean().item() / math.pi
