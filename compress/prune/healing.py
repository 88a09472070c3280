"""Linear healing: what removed blocks did, as far as it is linear, goes into the block before them.

ReplaceMe (arXiv 2505.02819): a linear map of the last projection's output in the block before a gap
is fitted so that the stream comes close to what left the gap, and is folded into the weight of that
projection. No tensor is added, so whatever runs the pruned model runs the healed one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint import FLOATS, TensorInfo
from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.streams import Streams
from compress.prune.surgery import BlockStack
from compress.signals import check_tokens, find_blocks, one_thread_each

if TYPE_CHECKING:
    import torch

RIDGE = 1.0


def fit_linear_heal(
    model: Any,
    tokens: torch.Tensor,
    removed: Collection[int],
    stack: BlockStack,
    *,
    ridge: float = RIDGE,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """By tensor name the float32 weights, and biases if any, that make up for blocks ``removed``.

    Gaps are healed in order, each in the stream that those before it leave. X [n, d] is the output
    of the last projection in the block before a gap, Y what it should have been for the stream to
    be the whole model's after the gap. T = (X'X + aI)^-1 (X'Y + aI), where a is ``ridge`` times the
    mean of X'X's diagonal, stays the closer to the identity the larger the ridge. The first token
    and attention sinks are left out.

    ``model``: float32, left as it is; ``tokens``: int64 [sequences, length]; ``stack``: the names
    of the checkpoint's blocks. Takes about one pass of the whole model and one of the pruned, and
    the memory of two states float32 [sequences, length, d] and a few float64 [d, d]. The result
    does not depend on ``threads`` (default: torch's number).

    Raises `BadInput` where block 0 is removed, where a block before a gap does not end in a linear
    projection that is added to the stream (a norm or experts come after it), for activations that
    are not finite, and as `check_tokens`.
    """
    import torch

    if not ridge > 0:
        raise BadInput("healing needs a positive ridge", got=ridge)
    check_tokens(model.config, tokens)
    gaps = _gaps(removed)
    streams = Streams(model, tokens, removed)
    on_cpu = next(model.parameters()).device.type == "cpu"
    workers = min(threads or torch.get_num_threads(), len(tokens)) if on_cpu else 1
    healed: dict[str, torch.Tensor] = {}
    with (
        streams.watching([before for before, _ in gaps]),
        one_thread_each(),
        progress.step("healing", len(gaps) * tokens.numel(), "tokens") as step,
    ):
        pool = ThreadPoolExecutor(workers)
        try:
            for before, end in gaps:
                last, share = streams.last_projection(before)
                gram: Any = 0
                cross: Any = 0
                sample = partial(streams.sample, before, end, share)
                for x, y in pool.map(sample, range(len(tokens))):
                    gram, cross = gram + x.T @ x, cross + x.T @ y
                    step.advance(tokens.shape[1])
                change = _solve(gram, cross, ridge, before)
                streams.heal(last, change, before, end)
                for part, value in _folded(last, change).items():
                    healed[f"{stack.prefix}.{before}.{streams.name(last, before)}.{part}"] = value
        finally:
            pool.shutdown(cancel_futures=True)
    return healed


def apply_heal(
    model: Any,
    healed: Mapping[str, torch.Tensor],
    infos: Mapping[str, TensorInfo],
    stack: BlockStack,
) -> None:
    """Put `fit_linear_heal`'s weights into the model, rounded as `remove_blocks` stores them."""
    import torch

    blocks = find_blocks(model)
    for name, value in healed.items():
        number, inner = name.removeprefix(f"{stack.prefix}.").split(".", 1)
        parameter = blocks[int(number)].get_parameter(inner)
        parameter.data.copy_(value.to(getattr(torch, FLOATS[infos[name].dtype])))


def _gaps(removed: Collection[int]) -> list[tuple[int, int]]:
    """For each run of removed blocks the block before it and the one after it."""
    blocks = sorted(removed)
    if 0 in blocks:
        raise BadInput("block 0 cannot be healed: there is none before it", got=f"{blocks} removed")
    befores = [block - 1 for block in blocks if block - 1 not in removed]
    ends = [block + 1 for block in blocks if block + 1 not in removed]
    return list(zip(befores, ends, strict=True))


def _solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float, before: int) -> torch.Tensor:
    """T of `fit_linear_heal`, float64 [d, d]."""
    import torch

    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise BadInput("activations are not finite", where=f"block {before}", got="NaN or infinity")
    # A projection that gives nothing but zeros has no scale of its own.
    size = ridge * float(gram.diagonal().mean()) or 1.0
    prior = size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + prior, cross + prior)


def _folded(projection: Any, change: torch.Tensor) -> dict[str, torch.Tensor]:
    """The projection's parameters such that its output is what it was, times ``change``."""
    import torch

    weight = projection.weight.detach().double()
    linear = isinstance(projection, torch.nn.Linear)  # transformers' Conv1D is transposed
    parts = {"weight": change.T @ weight if linear else weight @ change}
    if projection.bias is not None:
        parts["bias"] = projection.bias.detach().double() @ change
    return {name: value.float() for name, value in parts.items()}
