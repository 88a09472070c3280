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
from compress.prune.fitness import Removal, RemovalLoss, Unit
from compress.prune.search import (
    best_window,
    greedy,
    iterative,
    keep_better,
    last_k,
    random_choice,
    removable,
)

UNITS = removable("block", 8)


def test_what_may_go() -> None:
    assert removable("attention", 5) == [("attention", 2), ("attention", 3)]
    assert removable("mlp", 3, ()) == [("mlp", 0), ("mlp", 1), ("mlp", 2)]
    with pytest.raises(BadInput, match="no such block to protect"):
        removable("mlp", 3, [3])


def test_the_last_ones() -> None:
    assert last_k(UNITS, 2) == {("block", 5), ("block", 6)}
    assert last_k(UNITS, 0) == frozenset()
    both = [*removable("mlp", 4, ()), *removable("attention", 4, ())]
    assert last_k(both, 3) == {("mlp", 3), ("attention", 3), ("mlp", 2)}


@given(st.integers(0, 5), st.integers(0, 1000))
def test_chance_is_seeded_and_knows_no_order(drop: int, seed: int) -> None:
    chosen = random_choice(UNITS, drop, seed)
    assert len(chosen) == drop
    assert chosen <= set(UNITS)
    assert chosen == random_choice(UNITS[::-1], drop, seed)


def test_seeds_differ() -> None:
    assert len({random_choice(UNITS, 2, seed) for seed in range(30)}) == 10  # of 5 choose 2


def test_the_best_window_that_may_go() -> None:
    distances = [0.0, 0.3, 0.5, 0.2, 0.2, 0.1]  # of three blocks, from the first to the sixth
    assert best_window(distances, 3, UNITS) == {("block", i) for i in (3, 4, 5)}
    with pytest.raises(BadInput, match="no 3 adjacent blocks may all go"):
        best_window(distances, 3, [unit for unit in UNITS if unit[1] != 4])


def test_scores_are_taken_anew_after_each_removal() -> None:
    asked = []

    def measure(gone: Removal) -> dict[Unit, float]:
        asked.append(gone)
        scores = {unit: float(unit[1]) for unit in UNITS}
        if ("block", 2) in gone:
            scores["block", 3] = 9.0  # now it carries the work of both
        return scores

    assert iterative(measure, UNITS, 3) == [("block", 2), ("block", 4), ("block", 5)]
    assert asked == [frozenset(), {("block", 2)}, {("block", 2), ("block", 4)}]
    assert iterative(lambda gone: dict.fromkeys(UNITS, 0.0), UNITS[::-1], 2) == UNITS[:2]


def additive(costs: dict[Unit, float]) -> Callable[..., list[float]]:
    def fitness(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        return [sum(costs[unit] for unit in each) for each in candidates]

    return fitness


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.integers(0, 5))
def test_greedy_is_optimal_where_costs_add_up(costs: list[int], drop: int) -> None:
    fitness = additive(dict(zip(UNITS, map(float, costs), strict=True)))
    found = greedy(fitness, UNITS, drop)
    assert len(set(found)) == drop
    assert fitness([frozenset(found)])[0] == sum(sorted(costs)[:drop])


def test_greedy_on_a_model_takes_the_best_next_block(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    loss = RemovalLoss(model, torch.arange(80).reshape(2, 40) * 7 % 97)
    units = removable("block", 6, ())
    found = greedy(loss, units, 3)
    for step, unit in enumerate(found):
        gone = frozenset(found[:step])
        left = [each for each in units if each not in gone]
        losses = loss([gone | {each} for each in left])
        assert left[losses.index(min(losses))] == unit


@pytest.mark.parametrize(
    "rule",
    [
        lambda drop: last_k(UNITS, drop),
        lambda drop: random_choice(UNITS, drop, 0),
        lambda drop: greedy(additive({}), UNITS, drop),
    ],
)
@pytest.mark.parametrize("drop", [-1, 6])
def test_no_more_than_may_go(rule: Callable[[int], Any], drop: int) -> None:
    with pytest.raises(BadInput, match="expected at most 5 may go"):
        rule(drop)


@pytest.mark.parametrize("pair", list(combinations(UNITS[:3], 2)))
def test_the_one_shot_set_stays_unless_it_loses(pair: tuple[Unit, Unit]) -> None:
    costs = {("block", 2): 1.0, ("block", 3): 1.0, ("block", 4): 2.0}
    one_shot, found = pair
    choice = keep_better([one_shot], [found], additive(costs))
    assert (choice.removed, choice.searched) == ({one_shot}, False)
    assert (choice.one_shot, choice.found) == (costs[one_shot], costs[found])
    back = keep_better([found], [one_shot], additive(costs))
    better = costs[one_shot] < costs[found]
    assert (back.removed, back.searched) == ({one_shot if better else found}, better)
