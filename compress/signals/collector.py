"""One pass over calibration text that scores every block by every scorer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, did_you_mean
from compress.progress import SILENT, Progress
from compress.signals.angular import angular_distance
from compress.signals.blocks import block_input, block_output, find_blocks, run_base
from compress.signals.bucket import bucket_entropy
from compress.signals.cosine import cosine_distance
from compress.signals.diffusion import diffusion_entropy
from compress.signals.effective_rank import effective_rank
from compress.signals.gaussian import gaussian_entropy
from compress.signals.knn import NEIGHBOURS, knn_entropy
from compress.signals.matrix_entropy import matrix_entropy
from compress.signals.norm_ratio import norm_ratio
from compress.signals.nuclear_norm import nuclear_norm
from compress.signals.ranks import share_out
from compress.signals.renyi import renyi_kernel_entropy
from compress.signals.sinks import ordinary_tokens, sinks_written
from compress.signals.table import SCORERS, SCORERS_DEFAULT, BlockTable

if TYPE_CHECKING:
    import torch

MIN_LENGTH = 2 * NEIGHBOURS

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
}
# Of a block's input and output.
_OF_A_PAIR: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "cosine": cosine_distance,
    "norm_ratio": norm_ratio,
    "angular": angular_distance,
}


@dataclass(frozen=True)
class Part:
    """A piece of a block, by the modules whose outputs are added to the residual stream.

    It is scored on the block's input with what ``before`` adds, and on that with what ``module``
    adds.
    """

    module: torch.nn.Module
    before: torch.nn.Module | None = None


def collect(
    model: Any,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    parts: Sequence[Part] | None = None,
    scorers: Sequence[str] = SCORERS_DEFAULT,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> BlockTable:
    """Score the blocks of a transformers model on ``tokens``, int64 [sequences, length].

    ``parts``: one of each block, to score those and not whole blocks. ``attention_mask``, of the
    shape of ``tokens``, is 0 for padding. ``scorers``: names out of `SCORERS`;
    the default ones cost little beside the pass itself. Only a few numbers per block and
    sequence are kept. Every sequence runs by itself on one thread, ``threads`` (default: torch's
    number) of them side by side, so the result does not depend on how many there are; on a GPU they
    run one after another. Where `torch.distributed` is initialised, all its processes call this
    alike: each takes a share of the sequences, and all get the same table. Raises `BadInput` for
    unknown scorers, for tokens that the model cannot take and, naming the block, for activations
    that are not finite.
    """
    check_scorers(scorers)
    check_tokens(model.config, tokens)
    attended = tokens.new_ones(tokens.shape) if attention_mask is None else attention_mask

    def measure(share: range) -> BlockTable:
        part = slice(share.start, share.stop)
        masked = attention_mask is not None
        return _collect(
            model, tokens[part], attended[part], masked, parts, scorers, threads, progress
        )

    return share_out(len(tokens), measure)


def _collect(
    model: Any,
    tokens: torch.Tensor,
    attended: torch.Tensor,
    masked: bool,
    parts: Sequence[Part] | None,
    scorers: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> BlockTable:
    import torch

    blocks = find_blocks(model)
    device = next(model.parameters()).device
    current = threading.local()
    rows: list[_Window] = []

    def run(index: int) -> _Window:
        window = current.window = _Window(attended[index].bool().to(device), scorers)
        row = slice(index, index + 1)
        with torch.inference_mode():
            run_base(model, tokens[row].to(device), attended[row].to(device) if masked else None)
        return window

    workers = 1 if device.type != "cpu" else min(threads or torch.get_num_threads(), len(tokens))
    with (
        _hooks(blocks, parts, current),
        one_thread_each(),
        progress.step("calibrating", tokens.numel(), "tokens") as step,
    ):
        pool = ThreadPoolExecutor(max(1, workers))
        try:
            for window in pool.map(run, range(len(tokens))):
                rows.append(window)
                step.advance(tokens.shape[1])
        finally:
            pool.shutdown(cancel_futures=True)
    return BlockTable(
        {
            scorer: [[row.scores[block][scorer] for row in rows] for block in range(len(blocks))]
            for scorer in scorers
        },
        [[row.sinks[block] for row in rows] for block in range(len(blocks))],
    )


def check_scorers(scorers: Collection[str]) -> None:
    """Raise `BadInput` for a name that no scorer has."""
    for scorer in scorers:
        if scorer not in SCORERS:
            raise BadInput(f"unknown scorer '{scorer}'", mend=did_you_mean(scorer, SCORERS))


def check_tokens(config: Any, tokens: torch.Tensor) -> None:
    """Raise `BadInput` if a model of this config cannot be measured on ``tokens``."""
    check_length(config, tokens.shape[1])
    vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise BadInput(
            "the tokenizer does not fit the model",
            got=f"token {int(tokens.max())}",
            expected=f"less than vocab_size {vocabulary}",
        )


def check_length(config: Any, length: int) -> None:
    """Raise `BadInput` if windows of ``length`` tokens are too short or too long to measure on."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length < MIN_LENGTH or (most is not None and length > most):
        raise BadInput(
            "windows of this length cannot be measured",
            where="calibration.length",
            got=length,
            expected=f"{MIN_LENGTH} or more" if length < MIN_LENGTH else f"at most {most}",
            mend="set calibration.length in the recipe, or --length of `measure`",
        )


class _Window:
    """One sequence on its way through the blocks."""

    def __init__(self, attended: torch.Tensor, scorers: Sequence[str]) -> None:
        self.scores: list[dict[str, float]] = []
        self.sinks: list[int] = []
        self._attended = attended
        self._scorers = scorers
        self._input: torch.Tensor
        self._last: tuple[torch.Tensor, torch.Tensor, dict[str, float]] | None = None

    def enter(self, state: torch.Tensor) -> None:
        self._input = _copy(state[0])

    def sum(self, output: torch.Tensor) -> torch.Tensor:
        """The residual stream with what a module adds; it may be flat over batch and tokens."""
        return self._input + output.float().reshape(1, *self._input.shape)

    def add(self, output: torch.Tensor) -> None:
        self._input = self.sum(output)[0]

    def leave(self, block: int, state: torch.Tensor) -> None:
        x, y = self._input, _copy(state[0])
        if not (_finite(x) and _finite(y)):
            raise BadInput(
                "activations are not finite", where=f"block {block}", got="NaN or infinity"
            )
        keep = ordinary_tokens(x, y, self._attended)
        if int(keep.sum()) <= NEIGHBOURS:
            raise BadInput(
                "too few ordinary tokens in a calibration window",
                where=f"block {block}",
                got=int(keep.sum()),
                expected=f"more than {NEIGHBOURS}",
                mend="use longer windows",
            )
        kept = keep.nonzero().flatten()
        before, after = x.index_select(0, kept), y.index_select(0, kept)
        # The input is mostly the output of the block before, measured already.
        known = self._last and self._last[0].equal(keep) and self._last[1].equal(x)
        low = self._last[2] if self._last and known else self._of_a_state(before)
        high = self._of_a_state(after)
        self._last = keep, y, high
        self.sinks.append(sinks_written(x, y, self._attended))
        self.scores.append(
            {
                scorer: high[scorer] - low[scorer]
                if scorer in high
                else _OF_A_PAIR[scorer](before, after)
                for scorer in self._scorers
            }
        )

    def _of_a_state(self, x: torch.Tensor) -> dict[str, float]:
        return {scorer: _OF_A_STATE[scorer](x) for scorer in self._scorers if scorer in _OF_A_STATE}


def _copy(state: torch.Tensor) -> torch.Tensor:
    """A copy, even of a float32: blocks, and models between them, may add to a state in place."""
    import torch

    return state.to(torch.float32, copy=True)


def _finite(x: torch.Tensor) -> bool:
    """NaN and infinity show in the extremes, which are found sooner than every number is asked."""
    low, high = x.aminmax()
    return bool(low.isfinite() and high.isfinite())


@contextmanager
def _hooks(blocks: Any, parts: Sequence[Part] | None, current: Any) -> Iterator[None]:
    """Show every block's or part's input and output to the window that the running thread is at."""

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        current.window.enter(block_input(args, kwargs))

    def leave(block: int, module: Any, args: Any, output: Any) -> None:
        current.window.leave(block, block_output(output))

    def add(module: Any, args: Any, output: Any) -> None:
        current.window.add(block_output(output))

    def leave_part(block: int, module: Any, args: Any, output: Any) -> None:
        current.window.leave(block, current.window.sum(block_output(output)))

    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            if parts is None:
                handles.append(block.register_forward_hook(partial(leave, index)))
                continue
            if (before := parts[index].before) is not None:
                handles.append(before.register_forward_hook(add))
            module = parts[index].module
            handles.append(module.register_forward_hook(partial(leave_part, index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """New threads compute on one core each: torch takes over the number when a thread begins."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
