"""Which blocks are trained together: windows of equal size, or cut where little entropy leaves.

After Q-VLM (arXiv 2410.08119), where a high entropy of activations stands for a strong dependency
of what comes after on what comes before, and strongly dependent layers are reconstructed together.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.quant.qtensor import side_by_side
from compress.signals import (
    block_input,
    block_output,
    check_tokens,
    find_blocks,
    ordinary_tokens,
    run_base,
)

if TYPE_CHECKING:
    import torch


def uniform_windows(blocks: int, size: int) -> list[range]:
    """``blocks`` blocks in consecutive windows of ``size``, the last of what is left.

    Raises `BadInput` for a size below 1.
    """
    _check_size(size)
    return [range(first, min(first + size, blocks)) for first in range(0, blocks, size)]


def entropy_windows(entropies: Sequence[float], size: int) -> list[range]:
    """The cheapest consecutive windows of at most ``size`` blocks, as many as uniform ones.

    ``entropies``: of each block's output (`block_entropies`). A cut costs that of the block before
    it. Sums are exact; of equally cheap partitions it is the one that cuts first, then second and
    so on, the earliest. Raises `BadInput` for a size below 1 and entropies that are not finite.
    """
    count = len(entropies)
    for block, entropy in enumerate(entropies):
        if not math.isfinite(entropy):
            raise BadInput("its entropy is not finite", where=f"block {block}", got=entropy)
    prices = [Fraction(0), *map(Fraction, entropies[:-1]), Fraction(0)]  # of the end there is none
    # By first block the cheapest ways to the end in so many windows: their price, and their ends.
    ways: dict[int, tuple[Fraction, tuple[int, ...]]] = {count: (Fraction(0), ())}
    for _ in uniform_windows(count, size):
        longer = {}
        for first in range(count):
            known = [end for end in range(first + 1, first + size + 1) if end in ways]
            if known:
                longer[first] = min((prices[e] + ways[e][0], (e, *ways[e][1])) for e in known)
        ways = longer
    ends = (0, *ways[0][1])
    return [range(first, end) for first, end in pairwise(ends)]


def block_entropies(
    model: Any, tokens: torch.Tensor, *, progress: Progress = SILENT
) -> list[float]:
    """The entropy of each block's output, in nats, on ``tokens``, int64 [sequences, length].

    Of a token's state x [d], in the residual stream, the shares ``a_j = |x_j| / sum_k |x_k|`` of
    its channels have the entropy ``H = -sum_j a_j ln a_j``, from 0 to ln d; it is averaged over the
    ordinary tokens of a sequence (`ordinary_tokens`: no attention sinks), then over sequences. The
    paper's code divides |x| by its Euclidean norm over the tokens of each channel instead, which
    makes no distribution, of quantized activations and with the sinks.

    ``model``: in eval mode. Every sequence runs by itself, on one thread, so the result depends on
    no number of threads. Raises `BadInput` as `check_tokens`, and naming the block for states that
    are not finite and where there is no ordinary token.
    """
    import torch

    check_tokens(model.config, tokens)
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    at_once = torch.get_num_threads() if device.type == "cpu" else 1
    current = threading.local()

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        # A copy: the block may add to its input in place.
        current.input = block_input(args, kwargs)[0].to(torch.float32, copy=True)

    def leave(index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            state = block_output(output)[0].float()
            current.found.append(_entropy(current.input, state, f"block {index}"))

        return hook

    def run(index: int) -> list[float]:
        found: list[float] = []
        current.found = found
        with torch.inference_mode():
            run_base(model, tokens[index : index + 1].to(device))
        return found

    rows: list[list[float]] = []
    with ExitStack() as hooks, progress.step("calibrating", tokens.numel(), "tokens") as step:
        for index, block in enumerate(blocks):
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(leave(index)).remove)
        for first in range(0, len(tokens), at_once):
            part = side_by_side(run, range(first, min(first + at_once, len(tokens))))
            rows += part
            step.advance(len(part) * tokens.shape[1])
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def _entropy(x: torch.Tensor, y: torch.Tensor, where: str) -> float:
    """The mean over the ordinary tokens of a block's output ``y``, of input ``x`` [tokens, d]."""
    import torch

    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise BadInput("activations are not finite", where=where, got="NaN or infinity")
    keep = ordinary_tokens(x, y, torch.ones(len(y), dtype=torch.bool, device=y.device))
    if not bool(keep.any()):
        raise BadInput("no ordinary token in a calibration window", where=where)
    size = y[keep].double().abs()
    shares = size / size.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return float(-torch.xlogy(shares, shares).sum(1).mean())


def _check_size(size: int) -> None:
    if size < 1:
        raise BadInput("a window needs a block", where="window", got=size, expected="1 or more")
