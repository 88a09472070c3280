"""Which units go: the rules without a measurement, the step-by-step ones, and the held-out arbiter.

All choose among ``units``, those that may go: what is protected is left out of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.fitness import BLOCK, Fitness, Removal, Unit
from compress.signals import protected_blocks


def removable(kind: str, blocks: int, protect: Collection[int] | None = None) -> list[Unit]:
    """The units of one kind that may go, by block; ``protect`` as for `protected_blocks`."""
    kept = protected_blocks(blocks, protect)
    return [(kind, index) for index in range(blocks) if index not in kept]


def last_k(units: Collection[Unit], drop: int) -> Removal:
    """The ``drop`` units of the latest blocks: the baseline that any other rule has to beat."""
    _check(units, drop)
    return frozenset(sorted(units, key=lambda unit: (unit[1], unit[0]))[len(units) - drop :])


def random_choice(units: Collection[Unit], drop: int, seed: int) -> Removal:
    """``drop`` units by chance, the same ones for the same ``seed``."""
    _check(units, drop)
    return frozenset(random.Random(seed).sample(sorted(units), drop))


def best_window(distances: Sequence[float], drop: int, units: Collection[Unit]) -> Removal:
    """The ``drop`` adjacent blocks over which a state turns least, of those that may all go.

    ``distances``: those of `window_angular` for windows of ``drop`` blocks. Ties go to the
    earliest. Raises `BadInput` where every window holds a block that may not go.
    """
    windows = {
        start: frozenset((BLOCK, start + i) for i in range(drop)) for start in range(len(distances))
    }
    free = [start for start, window in windows.items() if window <= set(units)]
    if not free:
        raise BadInput(f"no {drop} adjacent blocks may all go", expected="fewer protected blocks")
    return windows[min(free, key=lambda start: distances[start])]


def iterative(
    measure: Callable[[Removal], Mapping[Unit, float]],
    units: Collection[Unit],
    drop: int,
    progress: Progress = SILENT,
) -> list[Unit]:
    """``drop`` units in the order of their removal, scores taken anew after each.

    ``measure`` scores the units of a model from which those it is given are gone; the lowest of
    ``units`` goes next, ties by name and index. Raises `BadInput` where fewer than ``drop`` may go.
    """
    _check(units, drop)
    gone: list[Unit] = []
    with progress.step("choosing step by step", drop, "removals") as step:
        for _ in range(drop):
            scores = measure(frozenset(gone))
            gone.append(min(set(units) - set(gone), key=lambda unit: (scores[unit], unit)))
            step.advance(1)
    return gone


def greedy(
    fitness: Fitness, units: Collection[Unit], drop: int, progress: Progress = SILENT
) -> list[Unit]:
    """`iterative` by what losing one more unit costs, each time of all that are left.

    The exact greedy search of SLEB (arXiv 2402.09025), its loss being whatever ``fitness`` is.
    """

    def measure(gone: Removal) -> dict[Unit, float]:
        left = sorted(set(units) - gone)
        return dict(zip(left, fitness([gone | {unit} for unit in left]), strict=True))

    return iterative(measure, units, drop, progress)


@dataclass(frozen=True)
class Choice:
    """What to remove, and the held-out losses that decided it."""

    removed: Removal
    one_shot: float
    found: float

    @property
    def searched(self) -> bool:
        """Whether the search won."""
        return self.found < self.one_shot


def keep_better(one_shot: Collection[Unit], found: Collection[Unit], fitness: Fitness) -> Choice:
    """The set that a search found where it beats the one-shot set on text that neither has seen.

    ``fitness`` measures on that text. Searches fit their calibration text, so the one-shot set
    stays unless the other's loss is lower.
    """
    sets = [frozenset(one_shot), frozenset(found)]
    losses = fitness(sets)
    return Choice(sets[losses[1] < losses[0]], *losses)


def _check(units: Collection[Unit], drop: int) -> None:
    if not 0 <= drop <= len(units):
        raise BadInput(
            f"cannot remove {drop} units", got=drop, expected=f"at most {len(units)} may go"
        )
