"""How many directions hidden states fill."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def effective_rank(x: torch.Tensor) -> float:
    """Effective rank of hidden states ``x``, float [tokens, d]: from 1 to ``min(tokens, d)``.

    RankMe (arXiv 2210.02885): ``exp(-sum_k p_k ln p_k)`` over the shares ``p`` of the singular
    values, themselves and not their squares, of ``x`` as it is, mean included. It does not change
    when ``x`` is scaled or turned. 0 for a zero ``x``.
    """
    import torch

    values = torch.linalg.svdvals(x.double())
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total else 0.0
