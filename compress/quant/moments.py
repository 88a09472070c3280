"""How large the inputs of linear layers are, column by column, over calibration text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from compress.errors import BadInput, did_you_mean
from compress.progress import SILENT, Progress
from compress.quant.qtensor import side_by_side
from compress.signals import check_tokens, run_base

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Moments:
    """Of the inputs of one layer, over ``tokens`` of them; float64 [columns].

    ``peak``: max |x_j|; ``squares``: the sum of x_j^2.
    """

    tokens: int
    peak: torch.Tensor
    squares: torch.Tensor

    @property
    def mean_square(self) -> torch.Tensor:
        """E[x_j^2], float64 [columns]."""
        return self.squares / self.tokens

    def __add__(self, other: Moments) -> Moments:
        import torch

        return Moments(
            self.tokens + other.tokens,
            torch.maximum(self.peak, other.peak),
            self.squares + other.squares,
        )


class _Sum(Protocol):
    def __add__(self, other: Self, /) -> Self: ...


_Found = TypeVar("_Found", bound=_Sum)


def measure_moments(
    model: Any,
    tokens: torch.Tensor,
    *,
    layers: Collection[str] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Moments]:
    """By name of their weights the moments of the inputs of a transformers model's linear layers.

    ``layers``: names of weights, None for all `torch.nn.Linear`; see `over_inputs`, which also says
    what is raised. Moments of parts of a text add up to those of the whole. `BadInput` too, naming
    the layer, for inputs that are not finite.
    """

    def moments(name: str, x: torch.Tensor) -> Moments:
        wide = x.double()
        found = Moments(len(wide), wide.abs().amax(0), wide.square().sum(0))
        if not bool(found.peak.isfinite().all()):
            raise BadInput("activations are not finite", where=name, got="NaN or infinity")
        return found

    return over_inputs(model, tokens, moments, layers=layers, progress=progress)


def over_inputs(
    model: Any,
    tokens: torch.Tensor,
    measure: Callable[[str, torch.Tensor], _Found],
    *,
    layers: Collection[str] | None = None,
    progress: Progress = SILENT,
) -> dict[str, _Found]:
    """By name of weight the sum of ``measure(name, x)`` over a layer's inputs x [tokens, columns].

    ``model``: in eval mode; ``tokens``: int64 [sequences, length]; ``layers``: names of weights,
    None for all `torch.nn.Linear`. Every sequence runs by itself, on one thread, and only what has
    been measured is kept, so the result depends on no number of threads. Layers that did not run,
    such as experts that no token went to, are not in it.

    Raises `BadInput` for a name that no linear layer has and for tokens that the model cannot take.
    """
    import torch

    check_tokens(model.config, tokens)
    chosen = linear_modules(model, layers)
    inside = set(model.base_model.modules())
    whole = any(module not in inside for module in chosen.values())  # a head is among them
    current = threading.local()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            x = args[0].flatten(0, -2)
            if len(x):
                _add(current.found, name, measure(name, x))

        return hook

    def run(index: int) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        current.found = found
        sequence = tokens[index][None].to(device)
        with torch.inference_mode():
            if whole:
                model(input_ids=sequence)
            else:
                run_base(model, sequence)
        return found

    device = next(model.parameters()).device
    at_once = torch.get_num_threads() if device.type == "cpu" else 1
    total: dict[str, _Found] = {}
    with ExitStack() as hooks, progress.step("calibrating", tokens.numel(), "tokens") as step:
        for name, module in chosen.items():
            hooks.callback(module.register_forward_pre_hook(watch(name)).remove)
        for first in range(0, len(tokens), at_once):
            part = range(first, min(first + at_once, len(tokens)))
            for found in side_by_side(run, part):
                for name, value in found.items():
                    _add(total, name, value)
                step.advance(tokens.shape[1])
    return {name: total[name] for name in chosen if name in total}


def linear_modules(model: Any, layers: Collection[str] | None = None) -> dict[str, torch.nn.Linear]:
    """A model's `torch.nn.Linear` by name of weight, in order, or those named in ``layers``.

    Raises `BadInput` for a name that none has.
    """
    import torch

    found = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for name in layers or ():
        if name not in found:
            raise BadInput(
                "is not the weight of a linear layer", where=name, mend=did_you_mean(name, found)
            )
    return {name: found[name] for name in found if layers is None or name in layers}


def _add(sums: dict[str, _Found], name: str, value: _Found) -> None:
    sums[name] = sums[name] + value if name in sums else value
