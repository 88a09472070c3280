from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import BadInput
from compress.prune.budget import Budget
from compress.prune.evolution import Evolution, Evolved, evolve
from compress.prune.fitness import Removal, RemovalLoss, Unit
from compress.prune.search import last_first, random_order, removable

UNITS = removable("block", 20)
COSTS = {unit: (unit[1] * 7 % 17) / 10 for unit in UNITS}
BUDGET = Budget.of_units(UNITS, 4)
START = BUDGET.cut(last_first(UNITS))
QUICK = Evolution(generations=12, offspring=8)


class Rugged:
    """Costs that add up but for neighbours, which hurt; little text shows them through noise."""

    def __init__(self) -> None:
        self.asked: list[tuple[int | None, list[Removal]]] = []

    def __call__(self, candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        self.asked.append((tokens, list(candidates)))
        return [self.loss(each, tokens) for each in candidates]

    def loss(self, removal: Removal, tokens: int | None) -> float:
        cost = sum(COSTS[unit] for unit in sorted(removal))
        cost += sum((kind, index + 1) in removal for kind, index in removal)
        seed = sum(index * 31**i for i, (_, index) in enumerate(sorted(removal)))
        return cost + (COSTS[random_order(UNITS, seed)[0]] if tokens == 2048 else 0)


def test_the_search_gets_better_and_never_worse() -> None:
    result = evolve(Rugged(), BUDGET, [START], Evolution(generations=60))
    assert list(result.history) == sorted(result.history, reverse=True)
    assert len(result.history) == 61
    assert result.fitness == result.history[-1] == Rugged().loss(result.removed, None)
    every = sorted(Rugged().loss(frozenset(each), None) for each in combinations(UNITS, 4))
    assert result.fitness <= every[9]  # of 2380; the noise hides the very best
    assert result.fitness < Rugged().loss(START, None)


def test_the_seed_alone_decides() -> None:
    first, again, other = (
        evolve(
            Rugged(),
            Budget.of_units(order, 4),
            [START],
            Evolution(generations=5, offspring=4, seed=seed),
        )
        for seed, order in ((0, UNITS), (0, UNITS[::-1]), (1, UNITS))
    )
    assert first == again
    assert first.history != other.history


def test_stages_thin_out_the_children() -> None:
    fitness = Rugged()
    settings = Evolution(generations=3, offspring=16, survivors=(4, 2, 1), tokens=(10, 100, 1000))
    evolve(fitness, BUDGET, [START], settings)
    counts = {
        budget: [len(sets) for asked, sets in fitness.asked if asked == budget]
        for budget in (10, 100, 1000)
    }
    assert all(4 < count <= 16 for count in counts[10])  # children may be twins, or known
    assert all(count <= 4 for count in counts[100])
    assert counts[1000][0] == 3  # the start and two of the random ones
    assert all(count <= 2 for count in counts[1000][1:])  # what the parent has is known
    assert len(counts[10]) == 4


def test_a_survivor_is_the_best_of_its_stage() -> None:
    fitness = Rugged()
    evolve(fitness, BUDGET, [START], QUICK)
    for (budget, sets), (later, left) in zip(fitness.asked, fitness.asked[1:], strict=False):
        if (budget, later) == (2048, 32768):
            best = sorted(fitness.loss(each, 2048) for each in sets)[:2]
            assert all(fitness.loss(each, 2048) <= best[-1] for each in left if each in sets)


def test_no_set_is_measured_twice() -> None:
    fitness = Rugged()
    evolve(fitness, BUDGET, [START], QUICK)
    pairs = [(tokens, each) for tokens, sets in fitness.asked for each in sets]
    assert len(pairs) == len(set(pairs))


def test_the_result_is_no_worse_than_any_start() -> None:
    """Even a start that little text shows as bad: starts skip the first stages."""
    starts = [BUDGET.cut(random_order(UNITS, seed)) for seed in range(6)]
    result = evolve(Rugged(), BUDGET, starts, Evolution(generations=0, offspring=6))
    assert result.fitness == min(Rugged().loss(start, None) for start in starts)
    assert result.removed in starts


def test_units_of_one_kind_may_be_swapped_for_another() -> None:
    budget = Budget.of_units([*removable("attention", 8), *removable("mlp", 8)], 3)
    start = {("attention", 2), ("attention", 5), ("mlp", 3)}
    seen: list[Removal] = []

    def fitness(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        seen.extend(candidates)
        return [float(sum(i + 10 * (kind == "mlp") for kind, i in each)) for each in candidates]

    result = evolve(fitness, budget, [start], QUICK)
    assert result.removed == {("attention", 2), ("attention", 3), ("attention", 4)}
    assert len(set(seen)) > 20
    assert len({sum(kind == "mlp" for kind, _ in each) for each in seen}) == 4
    for each in seen:
        assert len(each) == 3
        assert each <= set(budget.costs)


def test_every_set_meets_the_budget_and_no_more() -> None:
    budget = Budget({unit: 1 + 7 * unit[1] % 10 for unit in UNITS}, 19)
    seen: list[Removal] = []

    def fitness(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        seen.extend(candidates)
        return [sum(COSTS[unit] for unit in sorted(each)) for each in candidates]

    start = budget.cut(last_first(UNITS))
    result = evolve(fitness, budget, [start], Evolution(generations=40, offspring=8))
    assert len(set(seen)) > 50
    assert len({len(each) for each in seen}) > 2  # many small units, or few large ones
    for each in seen:
        assert budget.met(each)
        assert not any(budget.met(each - {unit}) for unit in each)
    least = min(
        fitness([frozenset(each)])[0]
        for size in range(1, 7)
        for each in combinations(UNITS, size)
        if budget.met(each)
    )
    assert result.fitness == pytest.approx(least)


def test_ties_keep_the_parent() -> None:
    result = evolve(lambda sets, tokens=None: [1.0] * len(sets), BUDGET, [START], QUICK)
    assert result == Evolved(START, 1.0, (1.0,) * 13)


def test_nothing_to_swap() -> None:
    whole = frozenset(UNITS)
    assert evolve(Rugged(), Budget.of_units(UNITS, 17), [whole], QUICK).removed == whole


def test_the_number_of_generations_follows_from_the_task() -> None:
    result = evolve(Rugged(), BUDGET, [START], Evolution(offspring=2))
    assert len(result.history) == 1 + math.ceil(4 * (17 - 4) / 1.5)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([], "must start from sets that remove enough, got no set, expected at least 4"),
        ([[]], "sets that remove enough, got 0, expected at least 4"),
        ([START, UNITS[:3]], "sets that remove enough, got 3, expected at least 4"),
        ([[*START, ("block", 1)]], "a start removes a unit that may not go, got block 1"),
        ([[("mlp", 5)]], "a start removes a unit that may not go, got mlp 5"),
    ],
)
def test_starts_that_start_no_search(starts: list[list[Unit]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        evolve(Rugged(), BUDGET, starts, QUICK)


def test_losses_that_are_not_finite() -> None:
    def lost(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        return [math.inf if each == START else 1.0 for each in candidates]

    assert evolve(lost, BUDGET, [START], QUICK).fitness == 1.0
    with pytest.raises(BadInput, match="no set of units has a finite loss"):
        evolve(lambda sets, tokens=None: [math.inf] * len(sets), BUDGET, [START], QUICK)


@pytest.mark.parametrize(
    "options",
    [
        {"survivors": (2,)},
        {"survivors": (2, 2)},
        {"survivors": (1, 2)},
        {"survivors": (33, 1)},
        {"tokens": (2048, 2048)},
        {"tokens": (0, 2048)},
        {"survivors": (), "tokens": ()},
        {"offspring": 0},
        {"swaps": 0},
        {"generations": -1},
    ],
)
def test_settings_that_make_no_search(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Evolution(**options)


def test_a_model_of_six_blocks_gives_up_its_optimum(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    loss = RemovalLoss(make_family("llama", tmp_path), torch.arange(160).reshape(4, 40) * 7 % 97)
    budget = Budget.of_units(removable("block", 6, ()), 2)
    pairs = [frozenset(pair) for pair in combinations(budget.units, 2)]
    losses = loss(pairs)
    settings = Evolution(generations=6, offspring=6, survivors=(2, 1), tokens=(40, 160))
    worst = pairs[losses.index(max(losses))]
    result = evolve(loss, budget, [worst], settings)
    assert (result.fitness, result.removed) == (min(losses), pairs[losses.index(min(losses))])
