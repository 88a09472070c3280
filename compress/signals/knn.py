"""Differential entropy from nearest-neighbour distances."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 25


def knn_entropy(x: torch.Tensor, k: int = NEIGHBOURS) -> float:
    """Entropy in nats of what the rows of ``x``, float [tokens, d], are drawn from.

    Kozachenko-Leonenko estimator in the form of EntroDrop (arXiv 2504.03794):
    ``d * mean_i ln r_i + (d / 2) ln pi - ln Gamma(d / 2 + 1) + ln N - ln k``, where ``r_i`` is the
    Euclidean distance of token ``i`` to its ``k``-th nearest other token. It has ``ln N - ln k`` in
    the place of ``psi(N) - psi(k)``; constants cancel in a difference of entropies. Scaling ``x``
    by ``c`` adds ``d * ln c``. Raises `ValueError` for ``k`` tokens or fewer.
    """
    import torch

    n, d = x.shape
    if n <= k:
        raise ValueError(f"{n} tokens have no {k}-th neighbours")
    # Distances come from inner products, which lose digits where a large common mean is left in.
    centred = x - x.mean(dim=0)
    squares = centred.square().sum(dim=1)
    distances = torch.addmm(squares, centred, centred.T, alpha=-2).add_(squares[:, None])
    distances.fill_diagonal_(math.inf)
    radii = _smallest(distances, k).clamp_min(0).sqrt()
    log_radius = radii.double().add(1e-10).log().mean().item()
    volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return d * log_radius + volume + math.log(n) - math.log(k)


def _smallest(distances: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k``-th smallest of each row, whose order is lost."""
    if distances.device.type != "cpu":
        return distances.kthvalue(k, dim=1).values
    # numpy selects several times as fast as torch does on a CPU.
    distances.detach().numpy().partition(k - 1, axis=1)
    return distances[:, k - 1]
