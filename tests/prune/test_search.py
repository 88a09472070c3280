from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.prune.budget import Budget
from compress.prune.fitness import Removal, RemovalLoss, Unit
from compress.prune.search import (
    best_window,
    greedy,
    iterative,
    last_first,
    random_order,
    removable,
)

UNITS = removable("block", 8)


def drops(drop: int, units: Sequence[Unit] = UNITS) -> Budget:
    return Budget.of_units(units, drop)


def test_what_may_go() -> None:
    assert removable("attention", 5) == [("attention", 2), ("attention", 3)]
    assert removable("mlp", 3, ()) == [("mlp", 0), ("mlp", 1), ("mlp", 2)]
    with pytest.raises(BadInput, match="no such block to protect"):
        removable("mlp", 3, [3])


def test_the_last_ones_first() -> None:
    assert last_first(UNITS[::-1]) == [("block", i) for i in (6, 5, 4, 3, 2)]
    both = [*removable("mlp", 4, ()), *removable("attention", 4, ())]
    assert last_first(both)[:3] == [("mlp", 3), ("attention", 3), ("mlp", 2)]


@given(st.integers(0, 1000))
def test_chance_is_seeded_and_knows_no_order(seed: int) -> None:
    order = random_order(UNITS, seed)
    assert sorted(order) == UNITS
    assert order == random_order(UNITS[::-1], seed)


def test_seeds_differ() -> None:
    firsts = {frozenset(random_order(UNITS, seed)[:2]) for seed in range(40)}
    assert len(firsts) == 10  # of 5 choose 2


def test_the_best_window_that_may_go() -> None:
    distances = [0.0, 0.3, 0.5, 0.2, 0.2, 0.1]  # of three blocks, from the first to the sixth
    assert best_window(distances, 3, drops(3)) == {("block", i) for i in (3, 4, 5)}
    with pytest.raises(BadInput, match="no 3 adjacent blocks may all go"):
        best_window(distances, 3, drops(3, [unit for unit in UNITS if unit[1] != 4]))


def test_the_best_window_that_is_enough() -> None:
    costs = {("block", 2): 1, ("block", 3): 1, ("block", 4): 5, ("block", 5): 5, ("block", 6): 5}
    distances = [0.0, 0.0, 0.1, 0.3, 0.2, 0.2, 0.0]  # of two blocks
    assert best_window(distances, 2, Budget(costs, 2)) == {("block", 2), ("block", 3)}
    assert best_window(distances, 2, Budget(costs, 6)) == {("block", 4), ("block", 5)}
    with pytest.raises(BadInput, match="no 2 adjacent blocks may all go and are enough"):
        best_window(distances, 2, Budget(costs, 11))


def test_scores_are_taken_anew_after_each_removal() -> None:
    asked = []

    def measure(gone: Removal) -> dict[Unit, float]:
        asked.append(gone)
        scores = {unit: float(unit[1]) for unit in UNITS}
        if ("block", 2) in gone:
            scores["block", 3] = 9.0  # now it carries the work of both
        return scores

    assert iterative(measure, drops(3)) == [("block", 2), ("block", 4), ("block", 5)]
    assert asked == [frozenset(), {("block", 2)}, {("block", 2), ("block", 4)}]
    assert iterative(lambda gone: dict.fromkeys(UNITS, 0.0), drops(2, UNITS[::-1])) == UNITS[:2]


def test_steps_go_on_until_the_budget_is_met() -> None:
    costs = dict(zip(UNITS, (1, 2, 3, 4, 5), strict=True))

    def measure(gone: Removal) -> dict[Unit, float]:
        return {unit: float(-unit[1]) for unit in UNITS}  # the largest first

    assert iterative(measure, Budget(costs, 5)) == UNITS[:3:-1]
    assert iterative(measure, Budget(costs, 6)) == UNITS[:2:-1]
    assert iterative(measure, Budget(costs, 15)) == UNITS[::-1]


def additive(costs: dict[Unit, float]) -> Callable[..., list[float]]:
    def fitness(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        return [sum(costs[unit] for unit in sorted(each)) for each in candidates]

    return fitness


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.integers(1, 5))
def test_greedy_is_optimal_where_costs_add_up(costs: list[int], drop: int) -> None:
    fitness = additive(dict(zip(UNITS, map(float, costs), strict=True)))
    found = greedy(fitness, drops(drop))
    assert len(set(found)) == drop
    assert fitness([frozenset(found)])[0] == sum(sorted(costs)[:drop])


def test_greedy_on_a_model_takes_the_best_next_block(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    loss = RemovalLoss(model, torch.arange(80).reshape(2, 40) * 7 % 97)
    units = removable("block", 6, ())
    found = greedy(loss, drops(3, units))
    for step, unit in enumerate(found):
        gone = frozenset(found[:step])
        left = [each for each in units if each not in gone]
        losses = loss([gone | {each} for each in left])
        assert left[losses.index(min(losses))] == unit
    best = min(loss([frozenset(each) for each in combinations(units, 1)]))
    assert loss([frozenset(found[:1])]) == [best]
