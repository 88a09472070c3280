"""Evolutionary search for the set of units whose loss costs least."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import dump_json, load_object, write_atomic
from compress.errors import BadInput, Corrupt
from compress.progress import SILENT, Progress
from compress.prune.fitness import Fitness, Removal, Unit


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
    units: Collection[Unit],
    starts: Sequence[Collection[Unit]],
    settings: Evolution,
    *,
    journal: Path | None = None,
    subject: str = "",
    progress: Progress = SILENT,
) -> Evolved:
    """Search the sets of ``units`` with as many of each kind as the ``starts`` have.

    EvoPress (arXiv 2410.14649, algorithm 1), elitist (1 + offspring): a child is the parent with a
    few units swapped, each for one of its kind; stages on more and more tokens thin the children
    out, and the parent goes when a child is better on the last one's. Other than there, the first
    parent is the best of ``starts``, the sets that cheap rules would remove, and of what is left of
    as many random ones as there are offspring; and a stage always measures on the same tokens, so
    that the result is never worse there than any of ``starts``.

    ``fitness`` must give a set the same loss whenever asked. The ``journal`` is rewritten after
    each generation, and a search that finds one goes on from there to the result that it would have
    had uninterrupted; one with more ``generations`` goes on from the end. ``subject`` names what
    ``fitness`` is of, so that no journal of something else is taken up.

    Raises `BadInput` for starts that differ in their counts or hold what may not go, for a journal
    of another search, and where no set has a finite loss; `Corrupt` for a journal that is none.
    """
    search = _Search(fitness, sorted(units), _checked(starts, units), settings)
    identity = _identity(search, subject)
    bests = _read(journal, identity) if journal else []
    total = 1 + search.generations()
    with progress.step("searching", total, "generations") as step:
        step.advance(min(len(bests), total))
        while len(bests) < total:
            bests.append(search.generation(len(bests), bests[-1] if bests else None))
            if journal:
                _write(journal, identity, bests)
            step.advance(1)
    loss, removed = bests[total - 1]
    return Evolved(removed, loss, tuple(loss for loss, _ in bests[:total]))


_Scored = tuple[float, Removal]


class _Search:
    """One search; what a generation gives depends on its number and its parent only."""

    def __init__(
        self, fitness: Fitness, units: list[Unit], starts: list[Removal], settings: Evolution
    ) -> None:
        self._fitness, self.units, self.starts, self.settings = fitness, units, starts, settings
        self._known: dict[tuple[Removal, int], float] = {}

    def generations(self) -> int:
        """How many follow the first parent."""
        if self.settings.generations is not None:
            return self.settings.generations
        drop = len(self.starts[0])
        return math.ceil(drop * (len(self.units) - drop) / 1.5)

    def generation(self, number: int, parent: _Scored | None) -> _Scored:
        """The best of a parent and its children; number 0 has starts and chance in their place."""
        # A generator for each: to go on after an interruption takes no saved state.
        chance = random.Random(f"{self.settings.seed}/{number}")
        count = self.settings.offspring
        if parent is None:
            incumbents = self.starts
            children = [self._random(chance) for _ in range(count - len(incumbents))]
        else:
            self._known[parent[1], self.settings.tokens[-1]] = parent[0]
            incumbents = [parent[1]]
            children = [self._mutated(parent[1], chance) for _ in range(count)]
        return self._select(incumbents, set(children) - set(incumbents))

    def _select(self, incumbents: list[Removal], children: set[Removal]) -> _Scored:
        *thinning, (_, tokens) = zip(self.settings.survivors, self.settings.tokens, strict=True)
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
        new = [removal for removal in ordered if (removal, tokens) not in self._known]
        losses = self._fitness(new, tokens) if new else []
        self._known.update(zip(((removal, tokens) for removal in new), losses, strict=True))
        scored = [(self._known[removal, tokens], removal) for removal in ordered]
        return sorted(scored, key=lambda each: each[0])

    def _random(self, chance: random.Random) -> Removal:
        kinds = Counter(kind for kind, _ in self.starts[0])
        return frozenset(
            unit
            for kind, count in sorted(kinds.items())
            for unit in chance.sample([unit for unit in self.units if unit[0] == kind], count)
        )

    def _mutated(self, parent: Removal, chance: random.Random) -> Removal:
        """Few swaps are likelier than many, as in EvoPress; they may undo one another."""
        gone = set(parent)
        most = self.settings.swaps
        for _ in range(min(chance.randint(1, most), chance.randint(1, most))):
            back = chance.choice(sorted(gone))
            kept = [unit for unit in self.units if unit not in gone and unit[0] == back[0]]
            if kept:
                gone ^= {back, chance.choice(kept)}
        return frozenset(gone)


def _checked(starts: Sequence[Collection[Unit]], units: Collection[Unit]) -> list[Removal]:
    """The distinct starts; `BadInput` where they cannot start one search."""
    sets = list(dict.fromkeys(frozenset(start) for start in starts))
    counts = {tuple(sorted(Counter(kind for kind, _ in start).items())) for start in sets}
    if len(counts) != 1 or () in counts:
        raise BadInput(
            "the starts of a search must remove as many units of each kind",
            got=", ".join(str(dict(count)) for count in sorted(counts)) or "none",
        )
    if stray := frozenset[Unit]().union(*sets) - set(units):
        kind, index = min(stray)
        raise BadInput("a start removes a unit that may not go", got=f"{kind} {index}")
    return sets


def _identity(search: _Search, subject: str) -> dict[str, Any]:
    """What the result depends on, but for the number of generations."""
    settings = asdict(search.settings)
    del settings["generations"]
    starts = [sorted(start) for start in search.starts]
    stated = {"settings": settings, "starts": starts, "subject": subject, "units": search.units}
    return json.loads(dump_json(stated))


def _write(journal: Path, identity: dict[str, Any], bests: Iterable[_Scored]) -> None:
    history = [{"loss": loss, "removed": sorted(removed)} for loss, removed in bests]
    write_atomic(journal, dump_json({"search": identity, "history": history}))


def _read(journal: Path, identity: dict[str, Any]) -> list[_Scored]:
    """Each generation's best; none where there is no journal."""
    if not journal.exists():
        return []
    document = load_object(journal)
    try:
        search = document["search"]
        bests = [
            (float(best["loss"]), frozenset((str(kind), int(i)) for kind, i in best["removed"]))
            for best in document["history"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt("not the journal of a search", where=journal, got=repr(error)) from None
    if search != identity:
        raise BadInput(
            "the journal is that of another search",
            where=journal,
            mend="remove it, or search with the same units, starts, settings and subject",
        )
    return bests
