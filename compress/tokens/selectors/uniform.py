"""Keep tokens at equal distances: what every selector must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.selectors.ranking import check_count, evenly

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class Uniform:
    """``k`` tokens evenly spaced in reading order, whatever they hold."""

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        n = len(segment.hidden)
        check_count(k, n)
        return evenly(n, k, segment.hidden.device)
