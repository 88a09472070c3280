"""The weights that are trained, and all that goes with a step of training them. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from compress.errors import BadInput
from compress.quant.qat.annealing import OscillationMeter
from compress.quant.qat.attention import Attention
from compress.quant.qat.distribution_guide import match_attention, repel_attention
from compress.quant.qat.entropy_guide import match_variances, maximize_entropy
from compress.quant.qat.fake_weight import FakeWeight
from compress.quant.qat.lsq import Lsq
from compress.quant.qat.rate import code_rate
from compress.quant.qat.settings import QatSettings
from compress.quant.qat.simulation import find_linear
from compress.quant.qat.statsq import StatsQ
from compress.quant.qtensor import QTensor, Scheme

CLIP = 1.0  # the longest gradient
_BETAS = (0.9, 0.999)


class Student(torch.nn.Module):
    """A `FakeWeight` for each of ``targets``, copied from the model's float32 weights.

    ``start``: quantized weights whose steps are begun with. Raises `BadInput` for targets that are
    no linear layer's weights, and as `FakeWeight`.
    """

    def __init__(
        self,
        model: Any,
        targets: Mapping[str, Scheme],
        settings: QatSettings,
        start: Mapping[str, QTensor],
    ) -> None:
        super().__init__()
        self.names, self._settings = list(targets), settings
        self._fakes = [
            _fake(find_linear(model, name).weight, scheme, settings, name, start.get(name))
            for name, scheme in targets.items()
        ]
        self._registered = torch.nn.ModuleList(self._fakes)
        self._meters = [OscillationMeter(fake()[1]) for fake in self._fakes]
        self._number = 0

    def begin(self, number: int) -> None:
        """A step begins: what annealing and the count of changes go by."""
        self._number = number

    def weights(self) -> dict[str, Callable[[], torch.Tensor]]:
        """By name, what computes the dense weight with its gradient."""
        return {name: partial(self._dense, place) for place, name in enumerate(self.names)}

    def penalty(self, own: Sequence[Attention], teacher: Sequence[Attention]) -> Any:
        """The guides and the rate, weighted: a scalar, 0 without any.

        Blocks without attention have no guides.
        """
        settings, literal = self._settings, self._settings.paper_literal
        total: Any = 0
        if own and settings.attention:
            guide = repel_attention if literal else match_attention
            total = total + settings.attention * guide(own, teacher)
        if own and settings.entropy:
            spread = maximize_entropy(own) if literal else match_variances(own, teacher)
            total = total + settings.entropy * spread
        return total + settings.rate * self._rate() if settings.rate else total

    def qtensors(self) -> dict[str, QTensor]:
        """The weights as they are stored, on the device that they are on."""
        return dict(zip(self.names, (fake.qtensor() for fake in self._fakes), strict=True))

    def oscillation(self) -> dict[str, float]:
        """The share of codes that changed more than once in the steps that were watched."""
        for fake, meter in zip(self._fakes, self._meters, strict=True):
            meter.update(fake()[1])
        shares = [meter.share for meter in self._meters]
        return dict(zip(self.names, shares, strict=True))

    def counts(self) -> dict[str, torch.Tensor]:
        """What the counts of changes are made of, to be kept and restored."""
        return {
            f"{kind}.{name}": getattr(meter, kind)
            for name, meter in zip(self.names, self._meters, strict=True)
            for kind in ("codes", "flips")
        }

    def _dense(self, place: int) -> torch.Tensor:
        values, codes = self._fakes[place](self._settings.within(self._number))
        watched = self._number > self._settings.steps - self._settings.watch
        self._meters[place].update(codes, watched)
        return values

    def _rate(self) -> torch.Tensor:
        within = self._settings.within(self._number)
        size = sum(fake.weight.numel() for fake in self._fakes)
        parts = [
            code_rate(fake.ratio(within), fake.limit) * (fake.weight.numel() / size)
            for fake in self._fakes
        ]
        return torch.stack(parts).sum()


def make_adam(module: torch.nn.Module, settings: QatSettings) -> torch.optim.AdamW:
    """Weights and steps are groups of their own."""
    named = list(module.named_parameters())
    steps = [value for name, value in named if name.endswith("log_step")]
    weights = [value for name, value in named if not name.endswith("log_step")]
    groups = [{"params": weights, "lr": settings.learning_rate}]
    if steps:
        groups.append({"params": steps, "lr": settings.step_rate})
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)


def adam_state(adam: Any, done: int) -> dict[str, torch.Tensor]:
    """Parameters and moments, which the first step would make, as after ``done`` steps."""
    state: dict[str, torch.Tensor] = {}
    for number, parameter in enumerate(_parameters(adam)):
        moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.tensor(float(done)), **moments}
        state |= {f"parameter.{number}": parameter.detach()}
        state |= {f"{kind}.{number}": moment for kind, moment in moments.items()}
    return state


def pace_adam(adam: Any, settings: QatSettings, number: int) -> None:
    """Rates and momentum of a step; annealing has none, or weights would not rest."""
    for group, rate in zip(
        adam.param_groups, (settings.learning_rate, settings.step_rate), strict=False
    ):
        group["lr"] = rate * settings.pace(number)
        group["betas"] = _BETAS if settings.within(number) is None else (0.0, _BETAS[1])


def check_loss(loss: float, length: float, where: str) -> None:
    """Raise `BadInput` for a loss or a gradient that is not finite."""
    if not math.isfinite(loss + length):
        raise BadInput(
            "the loss is not finite",
            where=where,
            got=f"{loss}, with a gradient of {length}",
            mend="lower qat.learning_rate or qat.step_rate",
        )


def _parameters(adam: Any) -> list[torch.Tensor]:
    return [parameter for group in adam.param_groups for parameter in group["params"]]


def _fake(
    w: torch.Tensor, scheme: Scheme, settings: QatSettings, name: str, start: QTensor | None
) -> FakeWeight:
    stored = getattr(torch, settings.scale_dtype)
    if settings.scale == "lsq":
        scale = None if start is None else start.scale
        return Lsq(w, scheme, stored, name, per_tensor=settings.per_tensor, start=scale)
    return StatsQ(w, scheme, stored, name, per_tensor=settings.per_tensor)
