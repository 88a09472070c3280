"""Keep the tokens that the image itself looks at, and some from in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.tokens.selectors.ranking import check_count, evenly, top

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class VisionZip:
    """Dominant tokens by mutual attention, the rest evenly spaced (VisionZip, arXiv 2412.04467).

    Not the whole method: there, contextual tokens take in the likest of those that go, and
    attention is the vision encoder's. Here tokens are kept or not, never merged, so the contextual
    ones are only sampled, evenly among those that are not dominant; and attention is that of layer
    K-1 of the language model, where in a causal model earlier tokens can be looked at by more.

    ``contextual``: their share of what is kept, 0 to 1; by default the paper's 10 of 64.
    """

    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        if not 0 <= self.contextual <= 1:
            raise BadInput(
                "no share", where="visionzip, contextual", got=self.contextual, expected="0 to 1"
            )

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        import torch

        n, device = len(segment.hidden), segment.hidden.device
        check_count(k, n)
        sampled = round(k * self.contextual)
        rest = torch.ones(n, dtype=torch.bool, device=device)
        if sampled < k:
            rest[top(segment.mutual_attention(), k - sampled)] = False
        others = rest.nonzero()[:, 0]
        rest[others[evenly(len(others), sampled, device)]] = False
        return (~rest).nonzero()[:, 0]
