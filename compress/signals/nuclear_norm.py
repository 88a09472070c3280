"""How much room hidden states take up, without eigenvalues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.signals.matrix_entropy import unit_tokens

if TYPE_CHECKING:
    import torch


def nuclear_norm(x: torch.Tensor) -> float:
    """Matrix Nuclear-Norm of hidden states, float [tokens, d], per token (arXiv 2410.10672).

    ``sum of the D largest ||Z_j|| / N`` over the columns ``Z_j`` of the `unit_tokens` ``Z`` of
    ``x``, ``D = min(N, d)``: an approximation of the sum of ``Z``'s singular values in time
    ``N * d``. At most ``sqrt(D / N)``, so only windows of equal length compare.
    """
    z = unit_tokens(x)
    norms = z.norm(dim=0)
    return norms.topk(min(z.shape)).values.sum().item() / len(z)
