"""Keep the tokens that the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.selectors.ranking import top

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class FastV:
    """The ``k`` tokens with most attention from the last prompt token (FastV, arXiv 2403.06764).

    Of layer K-1, mean over heads. As in the authors' program; the paper averages over all later
    tokens.
    """

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        return top(segment.last_attention(), k)
