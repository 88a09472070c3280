"""Keep tokens by lot: what every selector must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.selectors.ranking import check_count

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class RandomDraw:
    """``k`` tokens drawn with the segment's seed; torch's own generators are left alone."""

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        import torch

        n = len(segment.hidden)
        check_count(k, n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(segment.seed))
        return order[:k].sort().values.to(segment.hidden.device)
