"""Fewer bits for tokens that matter less: a simulation, for research.

EdgeQAT (arXiv 2402.10787v2, section on token-adaptive quantization) calls a token important by the
attention that it pays to the first one, a mean over the heads of the latest attention map, and
gives the top share of a sequence the wider codes. Which tokens those are depends on later ones,
and of a single new token none is ever among the others. Here a token is important whose attention
to the first one is at least ``threshold`` times the mean over all tokens up to itself: a rule that
needs no later token, so that one token at a time gets the widths that the whole sequence gets.

No format of checkpoints can state this, so it is never exported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import BadInput

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenBits:
    """Bits of the important tokens are those of the activations, of the others ``low``."""

    low: int = 4
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.low <= 8:
            raise BadInput("no such width", where="token_bits.low", got=self.low, expected="2 to 8")
        if not 0 <= self.threshold < float("inf"):
            raise BadInput(
                "no such threshold",
                where="token_bits.threshold",
                got=self.threshold,
                expected="a number, 0 or more",
            )


def important_tokens(maps: torch.Tensor, threshold: float) -> torch.Tensor:
    """bool [batch, tokens] for attention maps [batch, heads, tokens, tokens] of one block.

    The first token is always important up to a ``threshold`` of 1.
    """
    import torch

    score = maps.detach()[..., 0].float().mean(1)
    so_far = torch.arange(1, score.shape[1] + 1, device=score.device)
    return score >= threshold * score.cumsum(1) / so_far
