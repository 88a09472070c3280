"""Matrix entropy of the leading directions only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.signals.matrix_entropy import unit_tokens

if TYPE_CHECKING:
    import torch


def truncated_matrix_entropy(x: torch.Tensor, keep: int) -> float:
    """`matrix_entropy` of ``x``, float [tokens, d], with the ``keep`` largest eigenvalues only.

    UNComp's (arXiv 2410.03090): ``H = -sum_(i <= keep) l_i ln l_i / ln d`` over the shares ``l`` of
    all eigenvalues, largest first; what is left out is not made up for. With ``keep`` of
    ``min(tokens, d)`` or more it is `matrix_entropy`. 0 where the tokens do not differ.
    """
    import torch

    shares = torch.linalg.svdvals(unit_tokens(x)).square()
    total, d = shares.sum(), x.shape[1]
    if d == 1 or total == 0:
        return 0.0
    return torch.special.entr(shares[:keep] / total).sum().item() / math.log(d)
