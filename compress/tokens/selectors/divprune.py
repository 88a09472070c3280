"""Keep tokens that are far from each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.selectors.ranking import check_count, unit_rows

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class DivPrune:
    """``k`` tokens whose least cosine distance to each other is large (DivPrune, arXiv 2503.02175).

    First the token farthest from its nearest neighbour, then always the one farthest from the
    nearest of those chosen, in the hidden states that enter layer K. A zero token is at distance 1
    from all.
    """

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        import torch

        check_count(k, len(segment.hidden))
        x = unit_rows(segment.hidden)
        distance = 1 - x @ x.T
        distance.fill_diagonal_(math.inf)
        best = distance.amin(dim=1).argmax(dim=0, keepdim=True)
        nearest = torch.full_like(distance[0], math.inf)
        chosen = torch.empty(k, dtype=torch.long, device=x.device)
        for step in range(k):
            chosen[step : step + 1] = best
            nearest = torch.minimum(nearest, distance.index_select(0, best)[0])
            nearest.index_fill_(0, best, -math.inf)
            best = nearest.argmax(dim=0, keepdim=True)
        return chosen.sort().values
