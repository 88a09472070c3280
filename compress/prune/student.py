"""A model that is on its way to losing some units, beside the whole model that it learns from.

Imports torch; `distill` imports it when it runs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from compress.errors import BadInput
from compress.prune.fitness import BLOCK, SLICE, Unit, replaced
from compress.signals import block_input, find_blocks


class Gates:
    """Units of a model that take effect by a ``share``: 1 is as ever, 0 not computed at all.

    A block then turns x into ``x + share * (block(x) - x)``; the module of another unit gives
    ``share`` times what it would. What a unit without a share returns beside that is what it
    returned when it last had the whole.
    """

    def __init__(self, units: Mapping[Unit, torch.nn.Module]) -> None:
        self.share = 1.0
        self._units = units
        self._rests: dict[Unit, tuple[Any, ...] | None] = {}  # of a module that gives a tuple
        self._nothing: dict[Unit, torch.Tensor] = {}  # zeros of what a part gives

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Within, the units are gated."""
        with ExitStack() as stack:
            for unit, module in self._units.items():
                stack.enter_context(replaced(module, partial(self._forward, unit)))
            yield

    def _forward(self, unit: Unit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        is_block, share = unit[0] == BLOCK, self.share
        if share == 0:
            return self._like(unit, block_input(args, kwargs) if is_block else self._nothing[unit])
        # A block may add to its input in place, hence the copy.
        state = block_input(args, kwargs).clone() if is_block and share < 1 else None
        output = forward(*args, **kwargs)
        value = output[0] if isinstance(output, tuple) else output
        if share == 1:
            self._rests[unit] = output[1:] if isinstance(output, tuple) else None
            if not is_block:
                self._nothing[unit] = torch.zeros_like(value)
            return output
        return self._like(unit, share * value if state is None else state.lerp(value, share))

    def _like(self, unit: Unit, value: torch.Tensor) -> Any:
        rest = self._rests[unit]
        return value if rest is None else (value, *rest)


class Student(torch.nn.Module):
    """Has its own ``weights`` by parameter name, and shares all others with ``model``.

    Only those of ``trained`` are its parameters: what accelerate places and keeps equal.
    """

    def __init__(
        self,
        model: Any,
        gates: Gates,
        weights: Mapping[str, torch.Tensor],
        trained: list[str],
        temperature: float,
    ) -> None:
        super().__init__()
        self._model, self._gates, self._temperature = [model], gates, temperature
        self._names = trained
        self._fixed = {name: value for name, value in weights.items() if name not in trained}
        self._trained = torch.nn.ParameterList([weights[name] for name in trained])

    def weights(self) -> dict[str, torch.Tensor]:
        """Its own, by the model's parameter name."""
        return {**self._fixed, **dict(zip(self._names, self._trained, strict=True))}

    def forward(self, row: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """For a sequence [length] and a share: a scalar with the loss's gradient, and the loss.

        The loss is the mean over tokens of ``temperature^2 * KL(model || student)`` of the
        next-token distributions at that temperature, in nats. In memory are three times the logits
        of one sequence.
        """
        self._gates.share = 1.0
        with torch.no_grad():
            whole = logits(self._model[0], row)
        self._gates.share = share
        own = logits(self._model[0], row, self.weights())
        losses, gradient = _divergence(whole, own.detach(), self._temperature)
        return torch.dot(own.flatten(), gradient.flatten()) / len(row), losses.mean()


def logits(
    model: Any, row: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The logits float32 [length, vocabulary] for ``row`` [length], with ``weights`` if given."""
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}
    inputs = {"input_ids": row[None], **options}
    output = torch.func.functional_call(model, dict(weights or {}), (), inputs)
    found: torch.Tensor = output.logits[0].float()
    return found


def _divergence(
    whole: torch.Tensor, own: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's loss [tokens], and its gradient by ``own``, in the memory of ``whole``."""
    losses = []
    for reference, part in zip(whole.split(SLICE), own.split(SLICE), strict=True):
        log_p = torch.log_softmax(reference / temperature, 1)
        log_q = torch.log_softmax(part / temperature, 1)
        p = log_p.exp()
        losses.append(temperature**2 * (p * (log_p - log_q)).sum(1))
        reference.copy_(log_q.exp_().sub_(p).mul_(temperature))
    return torch.cat(losses), whole


@contextmanager
def borrowed(model: Any, device: torch.device) -> Iterator[None]:
    """The model on that device with no parameter that learns; back as it was after."""
    home = next(model.parameters()).device
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.to(device).requires_grad_(False)
        yield
    finally:
        model.to(home)
        for parameter in learned:
            parameter.requires_grad_(True)


def weights_to_own(
    model: Any, trained: Sequence[str], start: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the student has of its own: copies of the start and of what is trained."""
    known = dict(model.named_parameters())
    for name, value in start.items():
        if name not in known or value.shape != known[name].shape:
            raise BadInput(
                "no such weight to start from",
                where=name,
                got=list(value.shape),
                expected=list(known[name].shape) if name in known else "a parameter of the model",
            )
    chosen = {**{name: known[name] for name in trained}, **start}
    return {
        name: value.detach().to(known[name].device, known[name].dtype, copy=True)
        for name, value in chosen.items()
    }


def trainable(model: Any, gates: Gates, tokens: torch.Tensor, train: str) -> list[str]:
    """The names of the parameters that ``train`` of `Distillation` means, in the model's order.

    Without those that make no difference to ``tokens`` [length] once the gated units are gone, and
    without tied ones. ``model``: as `borrowed`. Raises `BadInput` where none is left.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    names = Counter(id(parameter) for _, parameter in named)
    inside = {id(parameter) for parameter in find_blocks(model).parameters()}
    wanted = {
        name: parameter
        for name, parameter in named
        if names[id(parameter)] == 1
        and (
            train == "all"
            or (train == "projections" and parameter.ndim > 1 and id(parameter) in inside)
            or (train == "norms" and _is_norm(model.get_submodule(name.rpartition(".")[0])))
        )
    }
    row = tokens.to(next(model.parameters()).device)
    gates.share = 1.0
    with torch.no_grad():
        logits(model, row)
    gates.share = 0.0
    try:
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        total = logits(model, row).sum()
        if not total.requires_grad:
            raise BadInput("there is nothing left to train", where="distillation.train", got=train)
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    finally:
        model.requires_grad_(False)
    return [name for name, grad in zip(wanted, grads, strict=True) if grad is not None]


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
