"""How sparse a weight tensor is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pq_index(w: torch.Tensor, p: float = 0.5, q: float = 1.0) -> float:
    """PQ index of a float tensor of any shape (arXiv 2302.05601), ``0 < p < q``.

    ``1 - n^(1/q - 1/p) ||w||_p / ||w||_q`` over the ``n`` weights: one less the ratio of their
    power means. From 0, all equal in size (zeros included), to ``1 - n^(1/q - 1/p)``, all but one
    of them zero. It does not change when ``w`` is scaled.
    """
    sizes = w.double().abs().flatten()
    most = sizes.max()
    if most == 0:
        return 0.0
    sizes /= most  # no power overflows
    low, high = (sizes.pow(power).mean() ** (1 / power) for power in (p, q))
    return 1 - (low / high).item()
