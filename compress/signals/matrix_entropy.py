"""Entropy of the directions that hidden states spread over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def matrix_entropy(x: torch.Tensor) -> float:
    """Matrix entropy of hidden states, float [tokens, d], as a share of its bound ``ln d``: 0 to 1.

    As of Diff-eRank (arXiv 2401.17139), normalised: of the `unit_tokens` ``Z`` of ``x``, ``H =
    -sum_i l_i ln l_i / ln d`` over the eigenvalues ``l`` of ``Z^T Z / tr(Z^T Z)``. ``N`` tokens
    span fewer than ``N`` directions, so ``H`` is at most ``ln(N - 1) / ln d`` where ``N <= d``, and
    only windows of equal length compare. 0 where the tokens do not differ.
    """
    import torch

    z = unit_tokens(x)
    n, d = z.shape
    # Z Z^T and Z^T Z have the same eigenvalues but zero: those of the smaller cost least.
    gram = z @ z.T if n < d else z.T @ z
    values = torch.linalg.eigvalsh(gram).clamp_min_(0)
    total = values.sum()
    if d == 1 or total == 0:
        return 0.0
    shares = values / total
    return -torch.xlogy(shares, shares).sum().item() / math.log(d)


def unit_tokens(x: torch.Tensor) -> torch.Tensor:
    """The rows of ``x`` [tokens, d] less their mean, each then of length 1: float64 [tokens, d].

    Rows equal to the mean become 0.
    """
    from torch.nn.functional import normalize

    x = x.double()
    return normalize(x - x.mean(dim=0), dim=1)
