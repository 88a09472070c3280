"""What the engine hands to a selector of tokens, and what it wants back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Segment:
    """The tokens of one image (or video, or run of prompt tokens) of one sequence, before layer K.

    A selector sees one segment at a time and never the padding, so what is kept of an image does
    not depend on what else is in the batch. Both attentions are computed from the queries and keys
    of layer K-1 only when called, in slices of rows, whatever attention the model runs.
    """

    hidden: torch.Tensor
    """[n, D] what enters layer K, in the model's dtype."""
    query: torch.Tensor
    """[n, heads, d] of layer K-1, before rotation, after a normalisation of queries if any."""
    text: torch.Tensor
    """[m, D] hidden states of the same sequence's tokens that are no candidates; no padding."""
    seed: int
    """From the policy's seed and the segment's place without padding: same in a batch as alone."""
    last_attention: Callable[[], torch.Tensor]
    """float32 [n]: attention of the sequence's last prompt token to each token, mean over heads."""
    mutual_attention: Callable[[], torch.Tensor]
    """float32 [n]: attention each receives from the segment's tokens, mean over heads and rows."""


Selector = Callable[[Segment, int], "torch.Tensor"]
"""Of a segment and a number k, which k tokens to keep: int64 [k], ascending and distinct."""


@dataclass(frozen=True, eq=False)
class KeptSegment:
    """One segment of the last prefill: which of its tokens went on.

    ``row``: of the batch; ``start``: where its ``tokens`` begin; ``positions``: int64 [kept],
    ascending. Both count from the beginning of the sequence, padding and earlier turns included.
    """

    row: int
    start: int
    tokens: int
    positions: torch.Tensor

    @property
    def kept(self) -> int:
        return self.positions.shape[0]


@dataclass(frozen=True, eq=False)
class PrefillReport:
    """What the engine did in the last forward that had tokens to prune.

    ``layer``: the first one without the pruned tokens; ``lengths``: of each layer, how many tokens
    of every row it computed (the longest row's, which shorter ones are filled up to); ``notes``:
    where and why the engine departed from the policy.
    """

    layer: int
    lengths: tuple[int, ...]
    segments: tuple[KeptSegment, ...]
    notes: tuple[str, ...] = ()
