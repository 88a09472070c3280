"""One pass over calibration text that scores every block by every scorer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.signals.blocks import block_input, block_output, find_blocks, run_base
from compress.signals.bucket import bucket_entropy
from compress.signals.cosine import cosine_distance
from compress.signals.knn import NEIGHBOURS, knn_entropy
from compress.signals.norm_ratio import norm_ratio
from compress.signals.sinks import ordinary_tokens, sinks_written
from compress.signals.table import SCORERS, BlockTable

if TYPE_CHECKING:
    import torch

MIN_LENGTH = 2 * NEIGHBOURS


def collect(
    model: Any,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> BlockTable:
    """Score the blocks of a transformers model on ``tokens``, int64 [sequences, length].

    ``attention_mask``, of the same shape, is 0 for padding. Only a few numbers per block and
    sequence are kept. Every sequence runs by itself on one thread, ``threads`` (default: torch's
    number) of them side by side, so the result does not depend on how many there are; on a GPU they
    run one after another. Raises `BadInput` for tokens that the model cannot take and, naming the
    block, for activations that are not finite.
    """
    import torch

    blocks = find_blocks(model)
    check_tokens(model.config, tokens)
    device = next(model.parameters()).device
    attended = torch.ones_like(tokens) if attention_mask is None else attention_mask
    current = threading.local()
    rows: list[_Window] = []

    def run(index: int) -> _Window:
        window = current.window = _Window(attended[index].bool().to(device))
        row = slice(index, index + 1)
        mask = None if attention_mask is None else attention_mask[row].to(device)
        with torch.inference_mode():
            run_base(model, tokens[row].to(device), mask)
        return window

    workers = 1 if device.type != "cpu" else min(threads or torch.get_num_threads(), len(tokens))
    with (
        _hooks(blocks, current),
        _one_thread_each(),
        progress.step("calibrating", tokens.numel(), "tokens") as step,
    ):
        pool = ThreadPoolExecutor(workers)
        try:
            for window in pool.map(run, range(len(tokens))):
                rows.append(window)
                step.advance(tokens.shape[1])
        finally:
            pool.shutdown(cancel_futures=True)
    return BlockTable(
        {
            scorer: [[row.scores[block][scorer] for row in rows] for block in range(len(blocks))]
            for scorer in SCORERS
        },
        [[row.sinks[block] for row in rows] for block in range(len(blocks))],
    )


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

    def __init__(self, attended: torch.Tensor) -> None:
        self.scores: list[dict[str, float]] = []
        self.sinks: list[int] = []
        self._attended = attended
        self._input: torch.Tensor
        self._last: tuple[torch.Tensor, torch.Tensor, tuple[float, float]] | None = None

    def enter(self, state: torch.Tensor) -> None:
        # A copy: a block may add to its input in place.
        self._input = state[0].float().clone()

    def leave(self, block: int, state: torch.Tensor) -> None:
        x, y = self._input, state[0].float()
        if not (x.isfinite().all() and y.isfinite().all()):
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
        before, after = self._entropies(x, keep), _entropies(y[keep])
        self._last = (keep, y, after)
        self.sinks.append(sinks_written(x, y, self._attended))
        scores = (
            after[0] - before[0],
            after[1] - before[1],
            cosine_distance(x[keep], y[keep]),
            norm_ratio(x[keep], y[keep]),
        )
        self.scores.append(dict(zip(SCORERS, scores, strict=True)))

    def _entropies(self, x: torch.Tensor, keep: torch.Tensor) -> tuple[float, float]:
        """Those of the input: mostly what was found for the output of the block before."""
        if self._last and self._last[0].equal(keep) and self._last[1].equal(x):
            return self._last[2]
        return _entropies(x[keep])


def _entropies(x: torch.Tensor) -> tuple[float, float]:
    return knn_entropy(x), bucket_entropy(x)


@contextmanager
def _hooks(blocks: Any, current: Any) -> Iterator[None]:
    """Show every block's input and output to the window that the running thread is at."""

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        current.window.enter(block_input(args, kwargs))

    def leave(block: int, module: Any, args: Any, output: Any) -> None:
        current.window.leave(block, block_output(output))

    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(partial(leave, index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """New threads compute on one core each: torch takes over the number when a thread begins."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
