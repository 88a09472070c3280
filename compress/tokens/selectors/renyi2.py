"""Von Neumann entropy's cheap neighbour, without eigenvalues."""

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
class Renyi2:
    """The ``k`` tokens of highest Renyi entropy of order 2 between heads (arXiv 1211.2459)."""

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        return top(renyi2(segment.query), k)


def renyi2(query: torch.Tensor) -> torch.Tensor:
    """Of queries [n, heads, d], each token's Renyi-2 entropy, float32 [n]: 0 to 1.

    ``-ln ||G / tr G||_F^2 / ln heads`` of `head_gram` ``G``: minus the log of the sum of squares of
    the shares whose Shannon entropy is `von_neumann`, which it never exceeds. 0 where the heads do
    not differ.
    """
    import torch

    squares = torch.linalg.matrix_norm(to_trace_one(head_gram(query))).square()
    return -squares.where(squares > 0, 1).log() / math.log(query.shape[1])
