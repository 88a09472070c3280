"""Keep the tokens whose queries vary least between heads: a control for the entropies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.selectors.head_gram import head_gram, trace
from compress.tokens.selectors.ranking import top

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class Energy:
    """The ``k`` tokens of least trace of `head_gram`: what decides in `released`, by itself.

    An entropy that does no better than this one measures nothing but size.
    """

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        return top(-trace(head_gram(segment.query)), k)
