"""What a model loses when each of its units is quantized in steps of its own, or left out.

Every genome takes the same coded bytes: what finer steps or absent weights change is made up for by
all steps together, so a search (`search_levels`) compares what the bytes buy and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import dump_json, load_object, write_atomic
from compress.errors import BadInput, Corrupt
from compress.prune import Unit
from compress.quant.allocation import Curve, allocate
from compress.quant.ecsq import quantize_ecsq
from compress.quant.moments import linear_modules

if TYPE_CHECKING:
    import torch

# By unit how many levels wider than the common steps its own are; None: it is dropped.
Genome = tuple[int | None, ...]

_CELLS = 1024  # of an octave, to which steps are rounded
_SLICE = 16  # tokens whose distributions are computed at a time: few, so that they stay in cache
_MEND = "remove it to measure anew, or start again with --overwrite"


@dataclass(frozen=True)
class LevelBudget:
    """``units``: their weights' names; ``curves``: of all weights that share ``target`` bits each.

    ``step``: octaves a level; ``fine``: weights that stay at 8 bits unless they are dropped;
    ``base``: factors at level 0 (`allocate`), 1 for weights that are not named.
    """

    units: Mapping[Unit, Sequence[str]]
    curves: Mapping[str, Curve]
    target: float
    step: float
    fine: Collection[str] = ()
    base: Mapping[str, float] = field(default_factory=dict)

    def dropped(self, genome: Genome) -> set[str]:
        """The weights of units that are dropped."""
        pairs = zip(self.units.values(), genome, strict=True)
        return {name for names, level in pairs if level is None for name in names}

    def factors(self, genome: Genome) -> dict[str, float]:
        """Of the other weights, as `allocate` takes them."""
        factors = {name: self.base.get(name, 1.0) for name in self.curves}
        for names, level in zip(self.units.values(), genome, strict=True):
            for name in names:
                factors[name] *= 2 ** (self.step * (level or 0))
        gone = self.dropped(genome)
        return {name: factor for name, factor in factors.items() if name not in gone}

    def c(self, genome: Genome) -> dict[str, float]:
        """The c of all weights: 0 for fine ones, infinite for those that are dropped.

        The common step is rounded up, at the cost of a thousandth of a bit at most: genomes that
        differ in few units then have the same for most of their weights. Raises as `allocate`.
        """
        gone = self.dropped(genome)
        found = allocate(self.curves, self.target, factors=self.factors(genome), dropped=gone)
        rounded = {n: 2 ** (math.ceil(math.log2(c) * _CELLS) / _CELLS) for n, c in found.items()}
        fixed = dict.fromkeys(self.fine, 0.0) | dict.fromkeys(gone, math.inf)
        return {name: (rounded | fixed)[name] for name in self.curves}


class LevelLoss:
    """Mean over tokens of ``KL(full || quantized)``, in nats, of the next-token distributions.

    ``model``: in eval mode; ``read`` gives what it holds by name of weight; ``tokens``: int64
    [sequences, length]; ``rows`` by name as for `quantize_ecsq`. The model is left as the last
    genome made it: `restore` reads the weights again. Held in memory, beside the model, are the
    full model's log-probabilities on all tokens, 4 bytes each: 200 MB for 1024 tokens of 49152
    kinds.

    Nothing is measured twice. Losses that stand in a ``journal`` (a JSON file, rewritten after each
    genome that was measured) are not measured either; ``subject`` names what they are of. Raises
    `BadInput` for a journal of another subject and for names that no linear layer has, `Corrupt`
    for a journal that is none.
    """

    def __init__(
        self,
        model: Any,
        read: Callable[[str], torch.Tensor],
        budget: LevelBudget,
        tokens: torch.Tensor,
        scale_dtype: torch.dtype,
        journal: Path | None = None,
        subject: str = "",
        rows: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._model, self._read, self._budget = model, read, budget
        self._layers = linear_modules(model, budget.curves)
        self._tokens = tokens.to(next(model.parameters()).device)
        self._scale_dtype, self._rows = scale_dtype, rows or {}
        self._journal, self._subject = journal, subject
        self._known: dict[Genome, list[float]] = {}  # a loss a sequence, as far as measured
        if journal and journal.exists():
            self._known = _read_journal(journal, subject)
        self._full: list[torch.Tensor] = []  # log-probabilities, one sequence each
        self._c: dict[str, float] = {}  # of the weights that the model holds quantized

    def __call__(self, genomes: Collection[Genome], sequences: int) -> list[float]:
        """The losses on the first sequences, infinite where NaN is computed.

        Raises as `LevelBudget.c` and `quantize_ecsq`, and `BadInput` where the full model computes
        NaN or infinity.
        """
        new = [each for each in genomes if len(self._known.get(each, ())) < sequences]
        steps = {each: self._budget.c(each) for each in new}
        for each in sorted(new, key=lambda each: list(steps[each].values())):  # like after like
            self._measure(each, steps[each], sequences)
        means = [sum(self._known[each][:sequences]) / sequences for each in genomes]
        return [math.inf if math.isnan(mean) else mean for mean in means]

    @property
    def sequences(self) -> int:
        """How many there are to measure on."""
        return len(self._tokens)

    def restore(self) -> None:
        """Give the model its weights back."""
        import torch

        with torch.no_grad():
            for name in self._c:
                self._layers[name].weight.copy_(self._read(name))
        self._c = {}

    def _measure(self, genome: Genome, steps: Mapping[str, float], sequences: int) -> None:
        import torch

        with torch.inference_mode():
            if not self._full:
                self._full = [self._log_p(row) for row in self._tokens]
            for name, c in steps.items():
                if self._c.get(name) != c:
                    self._put(name, c)
            losses = list(self._known.get(genome, ()))
            for index in range(len(losses), sequences):
                log_p, logits = self._full[index], self._logits(self._tokens[index])
                losses.append(_kl_sum(log_p, logits) / len(log_p))
        self._known[genome] = losses
        if self._journal:
            write_atomic(self._journal, dump_json(self._document()))

    def _put(self, name: str, c: float) -> None:
        """Quantize a weight of the model; an infinite ``c`` makes it zero."""
        import torch

        weight = self._layers[name].weight
        self._c[name] = math.nan  # to be restored, should this be cut short
        if math.isinf(c):
            weight.zero_()
        else:
            quantized = quantize_ecsq(
                self._read(name), c, self._scale_dtype, rows=self._rows.get(name), name=name
            )
            weight.copy_(quantized.dense(torch.float32))
        self._c[name] = c

    def _log_p(self, row: torch.Tensor) -> torch.Tensor:
        import torch

        logits = self._logits(row)
        if not bool(logits.isfinite().all()):
            raise BadInput("the model's logits are not finite", got="NaN or infinity")
        return torch.cat([part.log_softmax(1) for part in logits.split(_SLICE)])

    def _logits(self, row: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=row[None]).logits[0]
        return logits.float()

    def _document(self) -> dict[str, Any]:
        # Losses as text: JSON has no infinity.
        losses = [
            {"levels": list(genome), "losses": [repr(loss) for loss in losses]}
            for genome, losses in self._known.items()
        ]
        return {"subject": self._subject, "losses": losses}


def _kl_sum(log_p: torch.Tensor, logits: torch.Tensor) -> float:
    """``KL(p || q)`` summed over tokens, from ``ln p`` and the logits of ``q``."""
    total = 0.0
    for p, part in zip(log_p.split(_SLICE), logits.split(_SLICE), strict=True):
        total += (p.exp() * (p - part.log_softmax(1))).sum(1).double().sum().item()
    return total


def _read_journal(journal: Path, subject: str) -> dict[Genome, list[float]]:
    try:
        document = load_object(journal)
        found = document["subject"]
        known = {
            tuple(None if level is None else int(level) for level in each["levels"]): [
                float(loss) for loss in each["losses"]
            ]
            for each in document["losses"]
        }
    except (Corrupt, KeyError, TypeError, ValueError) as error:
        raise Corrupt(
            "not the journal of a search", where=journal, got=repr(error), mend=_MEND
        ) from None
    if found != subject:
        raise BadInput(
            "the journal is that of another search",
            where=journal,
            got=found,
            expected=subject,
            mend=_MEND,
        )
    return known
