"""How widely attention heads look around."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def attention_entropy(probabilities: torch.Tensor) -> float:
    """Mean over heads and queries of the entropy in nats of what a query attends to.

    ``probabilities``: float [heads, queries, keys], each row summing to 1 (Zhai et al., arXiv
    2303.06296). From 0, one key each, to ``ln keys``; under a causal mask query ``i`` reaches no
    more than ``ln(i + 1)``, so only windows of equal length compare.
    """
    import torch

    return torch.special.entr(probabilities.double()).sum(dim=-1).mean().item()
