"""Healing what pruning has hurt, kept only where text that it has not seen says that it helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.checkpoint import Checkpoint, TensorInfo
from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.distillation import Distillation, distill
from compress.prune.fitness import Removal, Unit
from compress.prune.healing import fit_linear_heal, parameter_of
from compress.prune.healing_gaps import Unhealable
from compress.prune.healing_loss import healed_kl
from compress.prune.settings import block_count
from compress.prune.surgery import BlockStack, find_stack

if TYPE_CHECKING:
    import torch

Method = Literal["linear", "distill"]


@dataclass(frozen=True)
class Healed:
    """The outcome of a healing.

    ``weights``: new values by tensor name of the checkpoint, none where nothing helped;
    ``kl_before`` and ``kl_after``: the KL divergence from the whole model on unseen text, without
    and with them, in nats a token; ``history``: the loss of each step of a distillation.
    """

    method: Method
    kl_before: float
    kl_after: float
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    history: tuple[float, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether it helped."""
        return bool(self.weights)


def heal(
    model: Any,
    checkpoint: Checkpoint,
    removed: Removal,
    tokens: torch.Tensor,
    unseen: torch.Tensor,
    *,
    method: Method,
    parts: Mapping[Unit, torch.nn.Module] | None = None,
    distillation: Distillation | None = None,
    journal: Path | None = None,
    subject: str = "",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Healed:
    """New weights for the units that stay, such that ``removed`` is missed less.

    "linear" is `fit_linear_heal`, "distill" that (where it can be and helps) and then `distill`.
    Both learn from ``tokens`` and are judged on ``unseen``, int64 [sequences, length]; the best
    outcome, or none, is kept. ``model``: float32,
    whole, left as it is; ``parts``: see `RemovalLoss`; ``journal``: a directory for an interrupted
    distillation, of the model that ``subject`` names. Raises as those two, `Unhealable` where a
    linear fold is asked for and cannot be, and `BadInput` where the model's parameters are not the
    checkpoint's tensors.
    """
    infos = checkpoint.tensor_infos()
    stack = find_stack(infos, block_count(checkpoint.config))

    def judge(weights: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        return healed_kl(
            model, unseen, removed, weights, infos, stack, parts=parts, progress=progress
        )

    linear: dict[str, torch.Tensor] = {}
    try:
        linear = fit_linear_heal(
            model, tokens, removed, stack, parts=parts, threads=threads, progress=progress
        )
    except Unhealable:
        if method == "linear":
            raise
    before, after = judge(linear)
    best, kl = (linear, after) if after < before else ({}, before)
    if method == "linear":
        return Healed("linear", before, kl, best)
    names = _parameter_names(model, infos, stack)
    trained = distill(
        model,
        tokens,
        removed,
        distillation or Distillation(),
        parts=parts,
        start={names[name]: value for name, value in best.items()},
        journal=journal and journal / "distillation.safetensors",
        subject=subject,
        progress=progress,
    )
    tensors = {parameter: name for name, parameter in names.items()}
    if strange := sorted(trained.weights.keys() - tensors.keys()):
        raise BadInput(
            "cannot be distilled: the model's parameters are not the checkpoint's tensors",
            where=strange[0],
            mend="heal: linear, or none",
        )
    weights = {tensors[parameter]: value for parameter, value in trained.weights.items()}
    _, after = judge(weights)
    best, kl = (weights, after) if after < kl else (best, kl)
    return Healed("distill", before, kl, best, trained.history)


def _parameter_names(
    model: Any, infos: Mapping[str, TensorInfo], stack: BlockStack
) -> dict[str, str]:
    """By tensor name the name of the parameter that it fills, where it fills one as it is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: parameter_of(model, name, stack) for name in infos}
    return {
        name: names[id(parameter)]
        for name, parameter in found.items()
        if parameter is not None and parameter.shape == infos[name].shape
    }
