"""Which units go: the rules without a measurement, and the step-by-step ones.

All choose among the units that may go: what is protected is left out of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.budget import Budget
from compress.prune.fitness import BLOCK, Fitness, Removal, Unit
from compress.signals import protected_blocks


def removable(kind: str, blocks: int, protect: Collection[int] | None = None) -> list[Unit]:
    """The units of one kind that may go, by block; ``protect`` as for `protected_blocks`."""
    kept = protected_blocks(blocks, protect)
    return [(kind, index) for index in range(blocks) if index not in kept]


def last_first(units: Collection[Unit]) -> list[Unit]:
    """The latest blocks' units first: the baseline that any other rule has to beat."""
    return sorted(units, key=lambda unit: (unit[1], unit[0]), reverse=True)


def random_order(units: Collection[Unit], seed: int) -> list[Unit]:
    """By chance, the same order for the same ``seed``."""
    return random.Random(seed).sample(sorted(units), len(units))


def best_window(distances: Sequence[float], size: int, budget: Budget) -> Removal:
    """The adjacent blocks over which a state turns least, of those that may all go.

    ``distances``: those of `window_angular` for windows of ``size`` blocks. Ties go to the
    earliest. Raises `BadInput` where no such window may go and meets the budget.
    """
    free = [window for window in windows_of(size, budget) if budget.met(window)]
    if not free:
        raise BadInput(
            f"no {size} adjacent blocks may all go and are enough",
            expected="fewer protected blocks",
        )
    return min(free, key=lambda window: distances[min(window)[1]])


def windows_of(size: int, budget: Budget) -> list[Removal]:
    """All runs of ``size`` adjacent blocks that may go, by their first."""
    starts = sorted(index for _, index in budget.costs)
    runs = [frozenset((BLOCK, start + i) for i in range(size)) for start in starts]
    return [run for run in runs if run <= budget.costs.keys()]


def iterative(
    measure: Callable[[Removal], Mapping[Unit, float]],
    budget: Budget,
    progress: Progress = SILENT,
) -> list[Unit]:
    """Units in the order of their removal until the budget is met, scores taken anew after each.

    ``measure`` scores the units of a model from which those it is given are gone; the lowest goes
    next, ties by name and index.
    """
    gone: list[Unit] = []
    with progress.step("choosing step by step", budget.target, "of the budget") as step:
        while not budget.met(gone):
            scores = measure(frozenset(gone))
            gone.append(min(set(budget.costs) - set(gone), key=lambda unit: (scores[unit], unit)))
            step.advance(budget.costs[gone[-1]])
    return gone


def greedy(fitness: Fitness, budget: Budget, progress: Progress = SILENT) -> list[Unit]:
    """`iterative` by what losing one more unit costs, each time of all that are left.

    The exact greedy search of SLEB (arXiv 2402.09025), its loss being whatever ``fitness`` is.
    """

    def measure(gone: Removal) -> dict[Unit, float]:
        left = sorted(set(budget.costs) - gone)
        return dict(zip(left, fitness([gone | {unit} for unit in left]), strict=True))

    return iterative(measure, budget, progress)
