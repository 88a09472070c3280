"""One calibration sequence on its way through the blocks, scored as it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.signals.angular import angular_distance
from compress.signals.bucket import bucket_entropy
from compress.signals.cosine import cosine_distance
from compress.signals.diffusion import diffusion_entropy
from compress.signals.effective_rank import effective_rank
from compress.signals.entrodrop import ENTRODROP
from compress.signals.gaussian import gaussian_entropy
from compress.signals.knn import NEIGHBOURS, knn_entropy
from compress.signals.matrix_entropy import matrix_entropy
from compress.signals.norm_ratio import norm_ratio
from compress.signals.nuclear_norm import nuclear_norm
from compress.signals.renyi import renyi_kernel_entropy
from compress.signals.sinks import ordinary_tokens, sinks_written

if TYPE_CHECKING:
    import torch

# Of a state: the score of a block is by how much its output has more than its input.
_OF_A_STATE: dict[str, Callable[[torch.Tensor], float]] = {
    "knn_entropy": knn_entropy,
    "bucket_entropy": bucket_entropy,
    "renyi_entropy": renyi_kernel_entropy,
    "gaussian_entropy": gaussian_entropy,
    "matrix_entropy": matrix_entropy,
    "effective_rank": effective_rank,
    "nuclear_norm": nuclear_norm,
    "diffusion_entropy": diffusion_entropy,
    **ENTRODROP,
}
# Of a block's input and output.
_OF_A_PAIR: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "cosine": cosine_distance,
    "norm_ratio": norm_ratio,
    "angular": angular_distance,
}


class Window:
    """The scores, by scorer, and the number of sinks written, of each block that it has left.

    ``attended``: bool [tokens], False for padding; ``scorers``: names out of `SCORERS`.
    """

    def __init__(self, attended: torch.Tensor, scorers: Sequence[str]) -> None:
        self.scores: list[dict[str, float]] = []
        self.sinks: list[int] = []
        self._attended = attended
        self._ours = _Scores([scorer for scorer in scorers if scorer not in ENTRODROP])
        self._entrodrop = _Scores([scorer for scorer in scorers if scorer in ENTRODROP])
        self._input: torch.Tensor

    def enter(self, state: torch.Tensor) -> None:
        """Take a block's input [1, tokens, d]."""
        self._input = _copy(state[0])

    def sum(self, output: torch.Tensor) -> torch.Tensor:
        """The residual stream with what a module adds; it may be flat over batch and tokens."""
        return self._input + output.float().reshape(1, *self._input.shape)

    def add(self, output: torch.Tensor) -> None:
        """Count what a module adds as input."""
        self._input = self.sum(output)[0]

    def leave(self, block: int, state: torch.Tensor) -> None:
        """Score ``block`` by its output [1, tokens, d].

        Raises `BadInput`, naming the block, where it or the input is not finite, and where too few
        ordinary tokens are left.
        """
        x, y = self._input, _copy(state[0])
        if not (_finite(x) and _finite(y)):
            raise BadInput(
                "activations are not finite", where=f"block {block}", got="NaN or infinity"
            )
        scores = self._entrodrop(x, y, self._attended)
        if self._ours.scorers:
            keep = ordinary_tokens(x, y, self._attended)
            if int(keep.sum()) <= NEIGHBOURS:
                raise BadInput(
                    "too few ordinary tokens in a calibration window",
                    where=f"block {block}",
                    got=int(keep.sum()),
                    expected=f"more than {NEIGHBOURS}",
                    mend="use longer windows",
                )
            scores |= self._ours(x, y, keep)
        for scorer, score in scores.items():
            if not math.isfinite(score):
                raise BadInput(
                    "activations are too large to score",
                    where=f"block {block}",
                    got=f"{scorer} {score}",
                )
        self.sinks.append(sinks_written(x, y, self._attended))
        self.scores.append(scores)


class _Scores:
    """Some scorers, and what they said of the state that they saw last."""

    def __init__(self, scorers: Sequence[str]) -> None:
        self.scorers = scorers
        self._last: tuple[torch.Tensor, torch.Tensor, dict[str, float]] | None = None

    def __call__(self, x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor) -> dict[str, float]:
        """The scores of a block with input ``x`` and output ``y``, on the tokens to ``keep``."""
        if not self.scorers:
            return {}
        kept = keep.nonzero().flatten()
        before, after = x.index_select(0, kept), y.index_select(0, kept)
        # The input is mostly the output of the block before, measured already.
        known = self._last and self._last[0].equal(keep) and self._last[1].equal(x)
        low = self._last[2] if self._last and known else self._of_a_state(before)
        high = self._of_a_state(after)
        self._last = keep, y, high
        return {
            scorer: high[scorer] - low[scorer]
            if scorer in high
            else _OF_A_PAIR[scorer](before, after)
            for scorer in self.scorers
        }

    def _of_a_state(self, x: torch.Tensor) -> dict[str, float]:
        return {scorer: _OF_A_STATE[scorer](x) for scorer in self.scorers if scorer in _OF_A_STATE}


def _copy(state: torch.Tensor) -> torch.Tensor:
    """A copy, even of a float32: blocks, and models between them, may add to a state in place."""
    import torch

    return state.to(torch.float32, copy=True)


def _finite(x: torch.Tensor) -> bool:
    """NaN and infinity show in the extremes, which are found sooner than every number is asked."""
    low, high = x.aminmax()
    return bool(low.isfinite() and high.isfinite())
