"""What it costs a model to lose some of its units, for many sets of them at once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from compress.errors import BadInput, did_you_mean
from compress.progress import SILENT, Progress, Step
from compress.signals import block_input, find_blocks

if TYPE_CHECKING:
    import torch

Unit = tuple[str, int]  # ("block" | "attention" | "mlp", index of the block)
Removal = frozenset[Unit]
BLOCK = "block"
METRICS = ("kl", "perplexity")
SLICE = 16  # tokens whose distributions are computed at a time: few, so that they stay in cache


class Fitness(Protocol):
    """The loss of each candidate on about ``tokens`` tokens, None for all; lower is better."""

    def __call__(self, candidates: Sequence[Removal], tokens: int | None = None) -> list[float]: ...


class RemovalLoss:
    """The loss of a model without some units, measured on ``tokens``, int64 [sequences, length].

    ``metric`` "kl" is the mean over all positions of ``KL(full || pruned)`` of the next-token
    distributions, in nats; "perplexity" that of the pruned model. A candidate that computes NaN has
    an infinite loss. A budget of tokens is rounded up to whole sequences, always the first ones.

    A block that is removed hands on its input. Units of other kinds need their module in ``parts``,
    which then gives zeros; that is their absence where the residual stream adds what they give, be
    it through a norm without a bias.

    Sequence by sequence the full model runs, then each candidate from the first block at which it
    differs from the one before it, in an order in which they share the most. In memory are one
    sequence's states before each block and two models' logits for it, however many there are.
    """

    def __init__(
        self,
        model: Any,
        tokens: torch.Tensor,
        *,
        parts: Mapping[Unit, torch.nn.Module] | None = None,
        metric: str = "kl",
        progress: Progress = SILENT,
    ) -> None:
        """Raises `BadInput` for an unknown metric, and as `find_blocks`."""
        if metric not in METRICS:
            raise BadInput("no such metric", got=metric, mend=did_you_mean(metric, METRICS))
        self._model, self._tokens, self._parts = model, tokens, parts or {}
        self._metric, self._progress = metric, progress
        self._blocks = find_blocks(model)

    def __call__(self, candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        """The losses in the order of the candidates.

        Raises `BadInput` for a unit that the model has not, and where the full model computes NaN
        or infinity.
        """
        return [self._mean(rows) for rows in self.by_sequence(candidates, tokens)]

    def by_sequence(
        self, candidates: Sequence[Removal], tokens: int | None = None
    ) -> list[list[float]]:
        """For each candidate the loss of each sequence, in nats a token; raises as a call does.

        With "perplexity" it is the mean negative log-likelihood, whose ``exp`` that is.
        """
        self._check(candidates)
        length = self._tokens.shape[1]
        count = None if tokens is None else max(1, math.ceil(tokens / length))
        rows = self._tokens[:count]
        order = sorted(set(candidates), key=self._decisions)
        found: dict[Removal, list[float]] = {removal: [] for removal in order}
        with self._progress.step(
            f"trying {len(order)} removals", rows.numel() * len(order), "tokens"
        ) as step:
            for row in rows:
                for removal, loss in zip(order, self._losses(row, order, step), strict=True):
                    found[removal].append(loss)
        return [found[removal] for removal in candidates]

    def _losses(self, row: torch.Tensor, order: list[Removal], step: Step) -> list[float]:
        """Each candidate's loss on one sequence [length], a mean over its positions."""
        import torch

        row = row.to(next(self._model.parameters()).device)
        path = _Path(self._blocks, self._parts)
        losses = []
        with torch.inference_mode(), path.followed():
            full = self._logits(row)
            if not full.isfinite().all():
                raise BadInput("the model's logits are not finite", got="NaN or infinity")
            reference = log_softmax_in_place(full) if self._metric == "kl" else None
            for removal in order:
                path.turn(removal)
                logits = self._logits(row)
                if reference is None:
                    losses.append(_nll(logits[:-1], row[1:]) / (len(row) - 1))
                else:
                    losses.append(kl_sum(reference, logits) / len(row))
                step.advance(len(row))
        return losses

    def _logits(self, row: torch.Tensor) -> torch.Tensor:
        known = inspect.signature(self._model.forward).parameters
        options = {"use_cache": False} if "use_cache" in known else {}
        logits: torch.Tensor = self._model(input_ids=row[None], **options).logits[0]
        return logits

    def _mean(self, rows: Sequence[float]) -> float:
        mean = sum(rows) / len(rows)
        if math.isnan(mean):
            return math.inf
        if self._metric == "kl":
            return mean
        return math.exp(mean) if mean < 700 else math.inf

    def _decisions(self, removal: Removal) -> list[list[Unit]]:
        """Sorted by these, neighbours have the longest common beginnings; the full model is first.

        One list a block: what of it is gone.
        """
        gone: list[list[Unit]] = [[] for _ in self._blocks]
        for unit in sorted(removal):
            gone[unit[1]].append(unit)
        return gone

    def _check(self, candidates: Sequence[Removal]) -> None:
        known = {(BLOCK, i) for i in range(len(self._blocks))} | set(self._parts)
        if strange := frozenset[Unit]().union(*candidates) - known:
            kind, index = min(strange)
            raise BadInput(
                "no such unit to remove",
                got=f"{kind} {index}",
                expected=f"one of {len(self._blocks)} blocks or {len(self._parts)} parts",
            )


class _Path:
    """One sequence's ways through the blocks: what a run shares with the one before is not redone.

    The first run, before any `turn`, is that of the full model. Everything around the blocks is the
    model's own code, since only what the modules compute is replaced.
    """

    def __init__(self, blocks: Any, parts: Mapping[Unit, torch.nn.Module]) -> None:
        self._blocks, self._parts = blocks, parts
        self._removal: Removal = frozenset()
        self._shared = 0  # so many leading blocks give what they gave in the run before
        self._states: list[Any] = [None] * len(blocks)  # what each block gave
        self._rests: dict[Unit, tuple[Any, ...] | None] = {}  # of a module that gives a tuple
        self._shapes: dict[Unit, torch.Size] = {}  # of what it gives

    def turn(self, removal: Removal) -> None:
        """The next run leaves out ``removal``."""
        changed = [index for _, index in removal ^ self._removal]
        self._removal, self._shared = removal, min(changed, default=len(self._states))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Within, the model's runs are the path's."""
        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(replaced(block, partial(self._block, index)))
            for unit, part in self._parts.items():
                stack.enter_context(replaced(part, partial(self._part, unit)))
            yield

    def _block(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        unit = (BLOCK, index)
        if index < self._shared:
            # The block after it may add to its input in place, hence the copies here and below.
            return self._like(unit, self._states[index].clone())
        if unit in self._removal:
            output = self._like(unit, block_input(args, kwargs))
        else:
            output = self._seen(unit, forward(*args, **kwargs))
        self._states[index] = (output[0] if isinstance(output, tuple) else output).clone()
        return output

    def _part(self, unit: Unit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if unit in self._removal:
            return self._like(unit, block_input(args, kwargs).new_zeros(self._shapes[unit]))
        return self._seen(unit, forward(*args, **kwargs))

    def _seen(self, unit: Unit, output: Any) -> Any:
        self._rests[unit] = output[1:] if isinstance(output, tuple) else None
        self._shapes[unit] = (output[0] if isinstance(output, tuple) else output).shape
        return output

    def _like(self, unit: Unit, state: torch.Tensor) -> Any:
        """``state`` as what the module returned when it last ran."""
        rest = self._rests[unit]
        return state if rest is None else (state, *rest)


@contextmanager
def replaced(module: Any, instead: Callable[..., Any]) -> Iterator[None]:
    """``instead`` gets the module's own forward as first argument.

    That may be the instance's, as where a model is spread over devices, and comes back after.
    """
    own = module.__dict__.get("forward")
    module.forward = partial(instead, module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def log_softmax_in_place(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, float32 [tokens, vocabulary], in the logits' memory where that fits."""
    import torch

    logits = logits.float()
    for part in logits.split(SLICE):
        part.copy_(torch.log_softmax(part, 1))
    return logits


def kl_sum(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """``KL(p || q)`` summed over tokens, from ``ln p`` and the logits of ``q``."""
    import torch

    total = 0.0
    for log_p, part in zip(reference.split(SLICE), logits.split(SLICE), strict=True):
        log_q = torch.log_softmax(part, 1, torch.float32)
        total += (log_p.exp() * (log_p - log_q)).sum(1).double().sum().item()
    return total


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The negative log-likelihood of ``targets`` [tokens], summed."""
    import torch

    total = 0.0
    for part, target in zip(logits.split(SLICE), targets.split(SLICE), strict=True):
        log_q = torch.log_softmax(part, 1, torch.float32).gather(1, target[:, None])
        total -= log_q.double().sum().item()
    return total
