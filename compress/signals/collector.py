"""One pass over calibration text that scores every block by every scorer."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, did_you_mean
from compress.progress import SILENT, Progress
from compress.signals.blocks import block_input, block_output, find_blocks, run_base
from compress.signals.knn import NEIGHBOURS
from compress.signals.ranks import share_out
from compress.signals.table import SCORERS, SCORERS_DEFAULT, BlockTable
from compress.signals.window import Window

if TYPE_CHECKING:
    import torch

MIN_LENGTH = 2 * NEIGHBOURS


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
    unknown scorers, for tokens that the model cannot take, for a mask that does not fit or leaves
    too few of them and, naming the block, for activations that are not finite.
    """
    check_scorers(scorers)
    check_tokens(model.config, tokens)
    if attention_mask is not None:
        _check_mask(tokens, attention_mask)
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
    rows: list[tuple[list[dict[str, float]], list[int]]] = []

    def run(index: int) -> tuple[list[dict[str, float]], list[int]]:
        window = current.window = Window(attended[index].bool().to(device), scorers)
        row = slice(index, index + 1)
        with torch.inference_mode():
            run_base(model, tokens[row].to(device), attended[row].to(device) if masked else None)
        return window.scores, window.sinks  # not the window, which holds states

    workers = 1 if device.type != "cpu" else min(threads or torch.get_num_threads(), len(tokens))
    with (
        _hooks(blocks, parts, current),
        one_thread_each(),
        progress.step("calibrating", tokens.numel(), "tokens") as step,
    ):
        pool = ThreadPoolExecutor(max(1, workers))
        try:
            for row in pool.map(run, range(len(tokens))):
                rows.append(row)
                step.advance(tokens.shape[1])
        finally:
            pool.shutdown(cancel_futures=True)
    return BlockTable(
        {
            scorer: [[scores[block][scorer] for scores, _ in rows] for block in range(len(blocks))]
            for scorer in scorers
        },
        [[sinks[block] for _, sinks in rows] for block in range(len(blocks))],
    )


def check_scorers(scorers: Collection[str]) -> None:
    """Raise `BadInput` for a name that no scorer has."""
    for scorer in scorers:
        if scorer not in SCORERS:
            raise BadInput(f"unknown scorer '{scorer}'", mend=did_you_mean(scorer, SCORERS))


def check_tokens(config: Any, tokens: torch.Tensor) -> None:
    """Raise `BadInput` if a model of this config cannot be measured on ``tokens``."""
    if tokens.ndim != 2 or not len(tokens):
        raise BadInput(
            "tokens are not in sequences", got=list(tokens.shape), expected="[sequences, length]"
        )
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


def _check_mask(tokens: torch.Tensor, mask: torch.Tensor) -> None:
    if mask.shape != tokens.shape:
        raise BadInput(
            "the attention mask does not fit the tokens",
            got=list(mask.shape),
            expected=list(tokens.shape),
        )
    attended = mask.bool().sum(dim=1)
    least = int(attended.argmin())
    if attended[least] <= NEIGHBOURS:
        raise BadInput(
            "the attention mask leaves too few tokens",
            where=f"sequence {least}",
            got=int(attended[least]),
            expected=f"more than {NEIGHBOURS}",
            mend="leave such a sequence out",
        )


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
