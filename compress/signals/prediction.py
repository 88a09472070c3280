"""How undecided a model is about the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROWS = 64  # tokens at a time: a vocabulary's probabilities in float64 are large


def next_token_entropy(logits: torch.Tensor) -> float:
    """Mean over tokens of the entropy in nats of the distribution that the logits stand for.

    ``logits``: float [tokens, vocabulary]; minus infinity rules a token out. From 0 to ``ln
    vocabulary``.
    """
    import torch

    total = sum(
        torch.special.entr(rows.double().softmax(dim=-1)).sum().item()
        for rows in logits.split(_ROWS)
    )
    return total / len(logits)
