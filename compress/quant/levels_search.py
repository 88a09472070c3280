"""Evolutionary search for the step of each unit, and for units to leave out, at one rate.

EvoPress (Sieberling et al., arXiv 2410.14649, algorithm 1) searches a width for each layer under a
budget of the mean width, and which layers to drop under a budget of layers. Here it is one search:
a unit's steps are some quarter octaves wider or finer than those of the others, or the unit is
dropped, and the steps of all that is left are as wide as one budget of coded bytes asks.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune import Evolution, Unit
from compress.quant.allocation import Curve, measure_curve, relative_steps
from compress.quant.ecsq import quantize_ecsq
from compress.quant.levels import Genome, LevelBudget, LevelLoss
from compress.signals import check_tokens

if TYPE_CHECKING:
    import torch

_DROPS = 0.25  # of the changes that a mutation makes where units may be dropped


@dataclass(frozen=True)
class LevelSearch:
    """How to search.

    Of a generation's ``offspring``, ``survivors[i]`` are left after stage ``i``, which measures
    them on ``tokens[i]`` tokens, rounded up to whole sequences. A mutation makes at most
    ``mutations`` changes: one unit's steps get finer by ``step`` octaves and another's wider, or a
    unit goes or comes back. ``most_drops``: units that may be gone at once, None for any number.
    """

    generations: int = 10
    offspring: int = 8
    survivors: tuple[int, ...] = (2, 1)
    tokens: tuple[int, ...] = (256, 1024)
    mutations: int = 3
    step: float = 0.25
    most_drops: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `BadInput` for numbers that make no search."""
        if self.mutations < 1 or not 0 < self.step < math.inf or (self.most_drops or 0) < 0:
            raise BadInput(
                "not a search",
                got=f"mutations {self.mutations}, step {self.step}, most_drops {self.most_drops}",
            )
        # The same stages, hence the same conditions.
        Evolution(self.generations, self.offspring, self.survivors, self.tokens)


@dataclass(frozen=True)
class Levels:
    """The best genome: ``factors`` as `fit_rate` takes them, of all weights of no unit ``dropped``.

    ``offsets``: by unit how many octaves wider than at first its steps are, None where dropped.

    In nats a token on the last stage's text ``loss``, ``start_loss`` with no offsets, and the
    ``history`` of the best of each generation, which begins before the first. ``unseen``: of the
    best and of no offsets, the loss on text that took no part in the search; where the best is
    worse there, there are none in ``factors`` and nothing is ``dropped``.
    """

    factors: dict[str, float]
    offsets: dict[Unit, float | None]
    loss: float
    start_loss: float
    history: tuple[float, ...]
    unseen: tuple[float, float] | None = None

    @property
    def dropped(self) -> tuple[Unit, ...]:
        """The units that are left out."""
        return tuple(unit for unit, offset in self.offsets.items() if offset is None)

    @property
    def kept(self) -> bool:
        """Whether it is what the search found."""
        return self.unseen is None or self.unseen[0] < self.unseen[1]


def search_levels(
    model: Any,
    read: Callable[[str], torch.Tensor],
    units: Mapping[Unit, Sequence[str]],
    fixed: Sequence[str],
    target: float,
    tokens: torch.Tensor,
    settings: LevelSearch,
    *,
    scale_dtype: torch.dtype,
    droppable: Collection[Unit] = (),
    fine: Collection[str] = (),
    sensitivities: Mapping[str, float] | None = None,
    rows: Mapping[str, torch.Tensor] | None = None,
    unseen: torch.Tensor | None = None,
    journal: Path | None = None,
    subject: str = "",
    progress: Progress = SILENT,
) -> Levels:
    """Search steps for ``units`` whose quantized model is closest to the full one (`LevelLoss`).

    ``model``: in eval mode; it is quantized over and over, and gets its weights back at the end,
    whatever happens. ``read`` gives what it holds by name of weight [rows, columns]. ``units``:
    the weights of each; ``fixed``: weights that take their share of ``target`` bits per weight and
    are in no unit; ``fine``: those of all that stay at 8 bits. A unit of ``droppable`` may become
    zeros, which is its absence where its last layer has no bias. ``tokens``: int64 [sequences,
    length]; ``unseen``: others, on which the outcome must beat one step for all. ``rows`` by name
    as for `quantize_ecsq`.

    Elitist (1 + offspring): a generation's parent goes when a child is better on the last stage's
    tokens. The first has no offsets, which is one step relative to the spread for all or what
    ``sensitivities`` make of them (see `allocate`), so the outcome is never worse there; before the
    first generation so many units as it has offspring are dropped from it, one at a time. The
    outcome depends on the arguments only; with a ``journal`` an interrupted search goes on to the
    same one.

    Rates are those of curves, measured on some rows; `fit_rate` with what is found is exact. Raises
    `BadInput` for a target that cannot be reached, for ``droppable`` that are no units and where no
    genome has a finite loss, and what `LevelLoss` and `measure_curve` raise.
    """
    check_tokens(model.config, tokens)
    if strange := set(droppable) - units.keys():
        raise BadInput("may be dropped but is no unit", got=" ".join(map(str, min(strange))))
    units = {unit: tuple(units[unit]) for unit in sorted(units)}
    names = [*(name for group in units.values() for name in group), *fixed]
    counts = [min(len(tokens), math.ceil(n / tokens.shape[1])) for n in settings.tokens]
    tokens = tokens[: counts[-1]]
    curves = {}
    with progress.step("measuring rates", len(names), "matrices") as step:
        for name in names:
            w = read(name)
            if name in fine:
                rate = quantize_ecsq(w, 0.0, scale_dtype, name=name).rate()
                curves[name] = Curve.flat(rate.weights, rate.bits_per_weight)
            else:
                own = rows.get(name) if rows else None
                curves[name] = measure_curve(
                    w, scale_dtype, rows=own, seed=settings.seed, name=name
                )
            step.advance(1)
    base = _finite(relative_steps(curves, sensitivities)) if sensitivities else {}
    coarse = [name for name in names if name in fine]
    budget = LevelBudget(units, curves, target, settings.step, coarse, base)
    told = _told(f"{subject} {scale_dtype}", budget, tokens, settings.seed)
    loss = LevelLoss(model, read, budget, tokens, scale_dtype, journal, told, rows)
    start: Genome = (0,) * len(units)
    may_go = [unit in droppable and settings.most_drops != 0 for unit in units]
    search = _Search(loss, start, may_go, counts, settings)
    bests: list[tuple[float, Genome]] = []
    try:
        with progress.step("searching levels", 1 + settings.generations, "generations") as step:
            for number in range(1 + settings.generations):
                bests.append(search.generation(number, bests[-1][1] if bests else None))
                step.advance(1)
        [start_loss] = loss([start], counts[-1])
    finally:
        loss.restore()
    del loss, search  # and the log-probabilities that they hold
    found, best = bests[-1]
    judged = None
    if unseen is not None:
        judge = LevelLoss(model, read, budget, unseen, scale_dtype, rows=rows)
        judged = _judged(judge, best, start)
        best = best if judged[0] < judged[1] else start
    return Levels(
        budget.factors(best),
        {
            unit: None if level is None else settings.step * level
            for unit, level in zip(units, best, strict=True)
        },
        found,
        start_loss,
        tuple(each for each, _ in bests),
        judged,
    )


def _judged(loss: LevelLoss, best: Genome, start: Genome) -> tuple[float, float]:
    """The losses of both on all tokens of ``loss``."""
    try:
        found, before = loss([best, start], loss.sequences)
    finally:
        loss.restore()
    return found, before


class _Search:
    """One search; what a generation gives depends on its number and its parent only.

    ``may_go``: by unit; ``counts``: the sequences of each stage.
    """

    def __init__(
        self,
        loss: LevelLoss,
        start: Genome,
        may_go: list[bool],
        counts: list[int],
        settings: LevelSearch,
    ) -> None:
        self._loss, self._start, self._counts, self._settings = loss, start, counts, settings
        self._free = [index for index, free in enumerate(may_go) if free]

    def generation(self, number: int, parent: Genome | None) -> tuple[float, Genome]:
        """The best of a parent and its children; number 0 has the start and drops from it."""
        chance = random.Random(f"{self._settings.seed}/{number}")
        count = self._settings.offspring
        if parent is None:
            start = self._start
            gone = chance.sample(self._free, min(count, len(self._free)))
            return self._select([start], {_with(start, index, None) for index in gone})
        return self._select([parent], {self._mutated(parent, chance) for _ in range(count)})

    def _select(self, incumbents: list[Genome], children: set[Genome]) -> tuple[float, Genome]:
        children -= set(incumbents)
        stages = list(zip(self._settings.survivors, self._counts, strict=True))
        for survivors, sequences in stages[:-1]:
            if len(children) > survivors:
                ranked = self._ranked(children, sequences, incumbents)
                children = {child for _, child in ranked[:survivors]}
        best = self._ranked(children.union(incumbents), self._counts[-1], incumbents)[0]
        if not math.isfinite(best[0]):
            raise BadInput("no choice of steps has a finite loss", got=best[0])
        return best

    def _ranked(
        self, genomes: Collection[Genome], sequences: int, incumbents: list[Genome]
    ) -> list[tuple[float, Genome]]:
        """Best first; of equals incumbents, then the finest."""
        ordered = sorted(genomes, key=lambda each: (each not in incumbents, _order(each)))
        scored = zip(self._loss(ordered, sequences), ordered, strict=True)
        return sorted(scored, key=lambda each: each[0])

    def _mutated(self, genome: Genome, chance: random.Random) -> Genome:
        """Few changes are likelier than many, as in EvoPress; they may undo one another."""
        most = self._settings.mutations
        for _ in range(min(chance.randint(1, most), chance.randint(1, most))):
            if self._free and chance.random() < _DROPS:
                genome = self._toggled(genome, chance)
            else:
                kept = [index for index, level in enumerate(genome) if level is not None]
                if len(kept) > 1:
                    for index, shift in zip(chance.sample(kept, 2), (-1, 1), strict=True):
                        genome = _with(genome, index, (genome[index] or 0) + shift)
        return genome

    def _toggled(self, genome: Genome, chance: random.Random) -> Genome:
        """A unit goes, or one comes back with the common step."""
        most = self._settings.most_drops
        full = most is not None and genome.count(None) >= most
        index = chance.choice([i for i in self._free if not full or genome[i] is None])
        return _with(genome, index, 0 if genome[index] is None else None)


def _with(genome: Genome, index: int, level: int | None) -> Genome:
    return (*genome[:index], level, *genome[index + 1 :])


def _order(genome: Genome) -> list[float]:
    return [math.inf if level is None else level for level in genome]


def _finite(factors: Mapping[str, float]) -> dict[str, float]:
    """Where an error does no harm, the widest of the others."""
    widest = max((f for f in factors.values() if math.isfinite(f)), default=1.0)
    return {name: min(factor, widest) for name, factor in factors.items()}


def _told(subject: str, budget: LevelBudget, tokens: torch.Tensor, seed: int) -> str:
    """The ``subject`` and a digest of all else that losses depend on."""
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy())
    units = [[*unit, *names] for unit, names in budget.units.items()]
    rest = [list(tokens.shape), budget.target, budget.step, seed, units, budget.fine]
    curves = [[name, budget.base.get(name), *c.bits] for name, c in budget.curves.items()]
    digest.update(json.dumps([rest, curves]).encode())
    return f"{subject} {digest.hexdigest()}"
