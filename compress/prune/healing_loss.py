"""Whether healing helps: a pruned model's distance from the whole one, without it and with it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compress.checkpoint import TensorInfo
from compress.progress import SILENT, Progress
from compress.prune.fitness import Unit, kl_sum, log_softmax_in_place
from compress.prune.healing import rounded
from compress.prune.surgery import BlockStack
from compress.prune.units import without

if TYPE_CHECKING:
    import torch


def healed_kl(
    model: Any,
    tokens: torch.Tensor,
    removed: Collection[Unit],
    healed: Mapping[str, torch.Tensor],
    infos: Mapping[str, TensorInfo],
    stack: BlockStack,
    *,
    parts: Mapping[Unit, torch.nn.Module] | None = None,
    progress: Progress = SILENT,
) -> tuple[float, float]:
    """``KL(full || pruned)`` and ``KL(full || healed)``, means over all positions, nats a token.

    ``tokens``: int64 [sequences, length], text that the fit has not seen, or the second says
    little; ``healed``: from `fit_linear_heal`, taken as the checkpoint would store it; ``parts``:
    see `RemovalLoss`. A model that computes NaN is infinitely far. In memory are two models' logits
    for one sequence. The model is left as it is.
    """
    import torch

    device = next(model.parameters()).device
    changes = [
        (parameter, value.to(device, parameter.dtype))
        for parameter, value in rounded(model, healed, infos, stack)
    ]
    before = after = 0.0
    with (
        torch.inference_mode(),
        progress.step("judging the healing", tokens.numel(), "tokens") as step,
    ):
        for row in tokens.to(device):
            reference = log_softmax_in_place(_logits(model, row))
            with without(model, frozenset(removed), parts):
                before += kl_sum(reference, _logits(model, row))
                with _changed(changes):
                    after += kl_sum(reference, _logits(model, row))
            step.advance(len(row))
    before, after = before / tokens.numel(), after / tokens.numel()
    return math.inf if math.isnan(before) else before, math.inf if math.isnan(after) else after


def _logits(model: Any, row: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=row[None], use_cache=False).logits[0]
    return logits


@contextmanager
def _changed(changes: Sequence[tuple[torch.nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    old = [parameter.data for parameter, _ in changes]
    try:
        for parameter, value in changes:
            parameter.data = value
        yield
    finally:
        for (parameter, _), value in zip(changes, old, strict=True):
            parameter.data = value
