"""Renyi entropies of hidden states, by the likeness of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.signals.matrix_entropy import unit_tokens

if TYPE_CHECKING:
    import torch

_ROUNDING = 1e-12  # of the squares of two tokens' lengths: nearer to each other they are equal


def renyi_kernel_entropy(x: torch.Tensor, alpha: float = 4.0) -> float:
    """Renyi entropy of order ``alpha`` in nats of the tokens ``x``, float [tokens, d].

    As in the code of EntroDrop (arXiv 2504.03794): ``ln(mean_ij K_ij^(alpha - 1)) / (1 - alpha)``,
    the power taken of each element, of the `median_kernel` of the features' standard scores. It
    does not change when a feature is scaled or shifted. Between 0, for tokens that do not differ,
    and ``ln(N) / (alpha - 1)``. ``alpha``: above 0, other than 1.
    """
    import torch

    x = x.double()
    spread = x.std(dim=0, correction=0)
    kernel = median_kernel(torch.where(spread > 0, x / spread, 0))
    return math.log(kernel.pow(alpha - 1).mean().item()) / (1 - alpha)


def renyi_matrix_entropy(x: torch.Tensor) -> float:
    """Matrix-based Renyi entropy of order 2 in nats of the tokens ``x``, float [tokens, d].

    ``-ln ||K / tr K||_F^2`` (arXiv 1211.2459) of ``K = Z Z^T``, ``Z`` the
    `unit_tokens` of ``x``: minus the log of the sum of squares of the eigenvalue shares whose
    Shannon entropy is `matrix_entropy`, which it never exceeds, and needs no eigenvalues. Its
    exponential is the participation ratio. 0 where the tokens do not differ.
    """
    z = unit_tokens(x)
    # Z Z^T and Z^T Z have the same trace and norm: the smaller costs least.
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    trace = gram.trace().item()
    return -math.log((gram / trace).square().sum().item()) if trace else 0.0


def median_kernel(x: torch.Tensor) -> torch.Tensor:
    """``exp(-|x_i - x_j|^2 / (2 s^2))``, ``s`` the median distance of all pairs: float64 [N, N].

    A token's distance to itself counts as a pair too. Where ``s`` is 0, equal tokens are 1 alike,
    all others 0.
    """
    import torch

    # Distances come from inner products, which lose digits where a large common mean is left in.
    x = x.double()
    centred = x - x.mean(dim=0)
    gram = centred @ centred.T
    total = gram.diagonal() + gram.diagonal()[:, None]
    squares = total - 2 * gram
    apart = squares > _ROUNDING * total
    width = torch.where(apart, squares, 0).median()
    return torch.where(apart, torch.exp(squares / width / -2), 1)
