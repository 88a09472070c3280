"""Evolutionary search for the set of units whose loss costs least."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.budget import Budget
from compress.prune.fitness import Fitness, Removal, Unit
from compress.prune.remembered import Remembered


@dataclass(frozen=True)
class Evolution:
    """How to search.

    Of a generation's ``offspring``, ``survivors[i]`` are left after stage ``i``, which measures
    them on ``tokens[i]`` tokens. ``swaps``: the most that one mutation makes. ``generations``: None
    for EvoPress's ``drop * (units - drop) / 1.5``.
    """

    generations: int | None = None
    offspring: int = 32
    survivors: tuple[int, ...] = (2, 1)
    tokens: tuple[int, ...] = (2048, 32768)
    swaps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `BadInput` for numbers that make no search."""
        falling = [self.offspring, *self.survivors]
        rising = [0, *self.tokens]
        if (
            len(self.survivors) != len(self.tokens)
            or falling != sorted(falling, reverse=True)
            or falling[-1] != 1
            or rising != sorted(set(rising))
        ):
            raise BadInput(
                "these stages make no selection",
                got=f"offspring {self.offspring}, survivors {self.survivors}, tokens {self.tokens}",
                expected="as many survivors as tokens, survivors falling to 1, tokens rising",
            )
        if self.swaps < 1 or (self.generations or 0) < 0:
            raise BadInput(
                "not a search", got=f"swaps {self.swaps}, generations {self.generations}"
            )


@dataclass(frozen=True)
class Evolved:
    """The best set, its fitness on the last stage's tokens, and that of each generation's best."""

    removed: Removal
    fitness: float
    history: tuple[float, ...]


def evolve(
    fitness: Fitness,
    budget: Budget,
    starts: Sequence[Collection[Unit]],
    settings: Evolution,
    *,
    progress: Progress = SILENT,
) -> Evolved:
    """Search the sets of units that save what the ``budget`` asks.

    EvoPress (arXiv 2410.14649, algorithm 1), elitist (1 + offspring): a child is the parent with a
    few units swapped; stages on more and more tokens thin the children out, and the parent goes
    when a child is better on the last one's. Other than there, the first parent is the best of
    ``starts``, the sets that cheap rules would remove, and of what is left of as many random ones
    as there are offspring; a stage always measures on the same tokens, so that the result is never
    worse there than any of ``starts``; units of one kind may be swapped for another; and where a
    swap saves too little or too much, units go or come back until the budget is met, no more.

    ``fitness`` must give a set the same loss whenever asked. It is asked for each once; to survive
    an interruption, give a `Remembered` one with a journal.

    Raises `BadInput` for starts that do not meet the budget or hold what may not go, and where no
    set has a finite loss.
    """
    search = _Search(Remembered(fitness), budget, _checked(starts, budget), settings)
    bests: list[_Scored] = []
    total = 1 + search.generations()
    with progress.step("searching", total, "generations") as step:
        for number in range(total):
            bests.append(search.generation(number, bests[-1] if bests else None))
            step.advance(1)
    loss, removed = bests[-1]
    return Evolved(removed, loss, tuple(loss for loss, _ in bests))


_Scored = tuple[float, Removal]


class _Search:
    """One search; what a generation gives depends on its number and its parent only."""

    def __init__(
        self, fitness: Fitness, budget: Budget, starts: list[Removal], settings: Evolution
    ) -> None:
        self._fitness, self._budget, self._settings = fitness, budget, settings
        self._starts, self._units = starts, budget.units

    def generations(self) -> int:
        """How many follow the first parent."""
        if self._settings.generations is not None:
            return self._settings.generations
        drop = len(self._starts[0])
        return math.ceil(drop * (len(self._units) - drop) / 1.5)

    def generation(self, number: int, parent: _Scored | None) -> _Scored:
        """The best of a parent and its children; number 0 has starts and chance in their place."""
        chance = random.Random(f"{self._settings.seed}/{number}")
        count = self._settings.offspring
        if parent is None:
            incumbents = self._starts
            children = [self._random(chance) for _ in range(count - len(incumbents))]
        else:
            incumbents = [parent[1]]
            children = [self._mutated(parent[1], chance) for _ in range(count)]
        return self._select(incumbents, set(children) - set(incumbents))

    def _select(self, incumbents: list[Removal], children: set[Removal]) -> _Scored:
        stages = zip(self._settings.survivors, self._settings.tokens, strict=True)
        *thinning, (_, tokens) = stages
        for survivors, budget in thinning:
            if len(children) > survivors:
                children = {child for _, child in self._ranked(children, budget)[:survivors]}
        ranked = self._ranked(children.union(incumbents), tokens)
        if not math.isfinite(ranked[0][0]):
            raise BadInput("no set of units has a finite loss", got=ranked[0][0])
        ties = [scored for scored in ranked if scored[0] == ranked[0][0]]
        return next((scored for scored in ties if scored[1] in incumbents), ties[0])

    def _ranked(self, candidates: Collection[Removal], tokens: int) -> list[_Scored]:
        """Best first, ties by the units' names and indices."""
        ordered = sorted(candidates, key=sorted)
        scored = zip(self._fitness(ordered, tokens), ordered, strict=True)
        return sorted(scored, key=lambda each: each[0])

    def _random(self, chance: random.Random) -> Removal:
        return self._budget.cut(chance.sample(self._units, len(self._units)))

    def _mutated(self, parent: Removal, chance: random.Random) -> Removal:
        """Few swaps are likelier than many, as in EvoPress; they may undo one another."""
        gone = parent
        most = self._settings.swaps
        for _ in range(min(chance.randint(1, most), chance.randint(1, most))):
            kept = [unit for unit in self._units if unit not in gone]
            if kept:
                back, new = chance.choice(sorted(gone)), chance.choice(kept)
                staying = sorted(gone - {back})
                others = [unit for unit in kept if unit != new]
                gone = self._budget.cut(
                    [
                        new,
                        *chance.sample(staying, len(staying)),
                        *chance.sample(others, len(others)),
                        back,
                    ]
                )
        return gone


def _checked(starts: Sequence[Collection[Unit]], budget: Budget) -> list[Removal]:
    """The distinct starts; `BadInput` where they cannot start this search."""
    sets = list(dict.fromkeys(frozenset(start) for start in starts))
    if stray := frozenset[Unit]().union(*sets) - set(budget.costs):
        kind, index = min(stray)
        raise BadInput("a start removes a unit that may not go", got=f"{kind} {index}")
    short = [budget.spent(start) for start in sets if not budget.met(start)]
    if short or not sets:
        raise BadInput(
            "a search must start from sets that remove enough",
            got=min(short, default="no set"),
            expected=f"at least {budget.target}",
        )
    return sets
