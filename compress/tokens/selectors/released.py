"""The score that EntropyPrune's program computes, which is not the one its paper defines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.selectors.head_gram import head_gram
from compress.tokens.selectors.ranking import top

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment

_FLOOR = 1e-10  # the program's least eigenvalue


@dataclass(frozen=True)
class Released:
    """The ``k`` tokens of highest score in the program published with arXiv 2602.17196."""

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        return top(released(segment.query), k)


def released(query: torch.Tensor) -> torch.Tensor:
    """Of queries [n, heads, d], each token's score, float64 [n]; of either sign.

    ``-sum_i l_i ln l_i / ln heads`` over the eigenvalues ``l`` of `head_gram` divided by the number
    of heads, and not by its trace ``t``. With shares ``p = l / t`` that is ``t H(p) - t ln t``. In
    trained models ``t`` is large, the last term decides, and what is kept are the tokens of least
    energy, close to `energy` and against `von_neumann`. Here to reproduce their numbers.
    """
    import torch

    values = torch.linalg.eigvalsh(head_gram(query, double=True) / query.shape[1]).clamp(min=_FLOOR)
    return -torch.xlogy(values, values).sum(dim=1) / math.log(query.shape[1])
