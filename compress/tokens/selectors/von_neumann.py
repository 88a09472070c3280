"""Keep the tokens whose heads say the most different things: EntropyPrune by its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.selectors.head_gram import head_gram, to_trace_one
from compress.tokens.selectors.ranking import top

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class VonNeumann:
    """The ``k`` tokens of highest von Neumann entropy (EntropyPrune, arXiv 2602.17196)."""

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        return top(von_neumann(segment.query), k)


def von_neumann(query: torch.Tensor) -> torch.Tensor:
    """Of queries [n, heads, d], each token's matrix entropy, float32 [n]: 0 to 1.

    ``-sum_i p_i ln p_i / ln heads`` over the eigenvalues ``p`` of `head_gram` at trace 1. 0 where
    the heads do not differ. The authors' program computes something else: `released`.
    """
    import torch

    values = torch.linalg.eigvalsh(to_trace_one(head_gram(query))).clamp(min=0)
    return torch.special.entr(values).sum(dim=1) / math.log(query.shape[1])
