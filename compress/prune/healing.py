"""Linear healing: what removed units did, as far as it is linear, goes into what is before them.

ReplaceMe (arXiv 2505.02819): a linear map of the output of the last projection before a gap is
fitted so that the stream comes close to what left the gap, and is folded into the weight of that
projection. No tensor is added, so whatever runs the pruned model runs the healed one. New here are
gaps of single attentions and MLPs, and that attention sinks are kept as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint import FLOATS, TensorInfo
from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.fitness import Unit
from compress.prune.healing_gaps import Gap, find_gaps
from compress.prune.streams import Streams
from compress.prune.surgery import BlockStack
from compress.signals import check_tokens, find_blocks, one_thread_each

if TYPE_CHECKING:
    import torch

RIDGE = 1.0


def fit_linear_heal(
    model: Any,
    tokens: torch.Tensor,
    removed: Collection[Unit],
    stack: BlockStack,
    *,
    parts: Mapping[Unit, torch.nn.Module] | None = None,
    ridge: float = RIDGE,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """By tensor name the float32 weights, and biases if any, that make up for ``removed``.

    Gaps are healed in order, each in the stream that those before it leave. What a dropped
    attention added is folded into the MLP of the block before it, what a dropped MLP added into its
    block's attention, or into the next one back that is left. A gap with nothing before it stays as
    it is, and nothing is returned for it.

    X [n, d] is the output of that projection, Y what it should have been for the stream to be the
    whole model's after the gap; Z [m, d] is its output for tokens that are left out of the two, the
    first of each sequence and attention sinks. T minimises |XT - Y|^2 + a|T - I|^2 + b|ZT - Z|^2:
    a is ``ridge`` times the mean of X'X's diagonal; b makes Z count as much as X. Without the last
    term, T ruins the sinks, which few tokens show and all of the model needs: SmolLM2-135M's
    perplexity of 24 without blocks 7 and 12 would become 25,000.

    ``model``: float32, left as it is; ``tokens``: int64 [sequences, length]; ``stack``: the names
    of the checkpoint's blocks; ``parts``: see `RemovalLoss`. Takes about one pass of the whole
    model and one of the pruned, and the memory of two states float32 [sequences, length, d] and a
    few float64 [d, d]. The result does not depend on ``threads`` (default: torch's number).

    Raises `BadInput` where there is nothing before a removed block, where what is before a gap does
    not end in a linear projection that is added to the stream (a norm or experts come after it),
    for activations that are not finite, and as `check_tokens`.
    """
    import torch

    if not ridge > 0:
        raise BadInput("healing needs a positive ridge", got=ridge)
    check_tokens(model.config, tokens)
    gaps = find_gaps(removed)
    streams = Streams(model, tokens, removed, parts or {})
    on_cpu = next(model.parameters()).device.type == "cpu"
    workers = min(threads or torch.get_num_threads(), len(tokens)) if on_cpu else 1
    healed: dict[str, torch.Tensor] = {}
    with (
        streams.watching([gap.before for gap in gaps]),
        one_thread_each(),
        progress.step("healing", len(gaps) * tokens.numel(), "tokens") as step,
    ):
        pool = ThreadPoolExecutor(workers)
        try:
            for gap in gaps:
                last, share = streams.last_projection(gap.before)
                gram: Any = 0
                cross: Any = 0
                idle: Any = 0
                for x, y, z in pool.map(partial(streams.sample, gap, share), range(len(tokens))):
                    gram, cross, idle = gram + x.T @ x, cross + x.T @ y, idle + z.T @ z
                    step.advance(tokens.shape[1])
                change = _solve(gram, cross, idle, ridge, gap)
                streams.heal(last, change, gap)
                name = f"{stack.prefix}.{gap.before}.{streams.name(last, gap.before)}"
                for part, value in _folded(last, change).items():
                    healed[f"{name}.{part}"] = value
        finally:
            pool.shutdown(cancel_futures=True)
    return healed


def apply_heal(
    model: Any,
    healed: Mapping[str, torch.Tensor],
    infos: Mapping[str, TensorInfo],
    stack: BlockStack,
) -> None:
    """Put `fit_linear_heal`'s weights into the model, rounded as the checkpoint stores them."""
    for parameter, value in rounded(model, healed, infos, stack):
        parameter.data.copy_(value)


def rounded(
    model: Any,
    healed: Mapping[str, torch.Tensor],
    infos: Mapping[str, TensorInfo],
    stack: BlockStack,
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """The model's parameters that are healed, with their new values in the checkpoint's dtypes."""
    import torch

    for name, value in healed.items():
        parameter = parameter_of(model, name, stack)
        if parameter is None:
            raise BadInput("the model has no parameter for a tensor", where=name)
        yield parameter, value.to(getattr(torch, FLOATS[infos[name].dtype]))


def parameter_of(model: Any, name: str, stack: BlockStack) -> torch.nn.Parameter | None:
    """The parameter that a tensor of the checkpoint fills as it is; None where there is none."""
    block = stack.block(name)
    module, inner = model, name
    if block is not None:
        module = find_blocks(model)[block]
        inner = name.removeprefix(f"{stack.prefix}.{block}.")
    try:
        parameter: torch.nn.Parameter = module.get_parameter(inner)
    except AttributeError:
        return None
    return parameter


def _solve(
    gram: torch.Tensor, cross: torch.Tensor, idle: torch.Tensor, ridge: float, gap: Gap
) -> torch.Tensor:
    """T of `fit_linear_heal` from X'X, X'Y and Z'Z, float64 [d, d]."""
    import torch

    if not all(part.isfinite().all() for part in (gram, cross, idle)):
        raise BadInput(
            "activations are not finite", where=f"block {gap.before}", got="NaN or infinity"
        )
    # A projection that gives nothing but zeros has no scale of its own.
    size = ridge * float(gram.diagonal().mean()) or 1.0
    weight = float(gram.trace()) / (float(idle.trace()) or 1.0)
    prior = weight * idle + size * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
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
