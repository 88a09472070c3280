from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.prune.budget import Budget
from compress.prune.fitness import Unit

UNITS: list[Unit] = [(kind, i) for kind in ("attention", "mlp") for i in range(4)]


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Budget, list[Unit]]:
    """A budget that can be met, and an order of its units."""
    costs = draw(st.lists(st.integers(0, 9), min_size=8, max_size=8).filter(any))
    target = draw(st.integers(1, sum(costs)))
    order = draw(st.permutations(UNITS))
    return Budget(dict(zip(UNITS, costs, strict=True)), target), order


@given(budgets())
def test_a_cut_is_enough_and_nothing_of_it_can_come_back(case: tuple[Budget, list[Unit]]) -> None:
    budget, order = case
    chosen = budget.cut(order)
    assert budget.met(chosen)
    assert not any(budget.met(chosen - {unit}) for unit in chosen)
    assert budget.spent(chosen) == sum(budget.costs[unit] for unit in chosen)


@given(budgets())
def test_a_cut_takes_from_the_first_units_that_are_enough(
    case: tuple[Budget, list[Unit]],
) -> None:
    budget, order = case
    needed = next(n for n in range(len(order) + 1) if budget.met(order[:n]))
    assert budget.cut(order) <= set(order[:needed])
    assert order[needed - 1] in budget.cut(order)  # without the last they were not enough


@given(st.permutations(UNITS), st.integers(1, 8), st.integers(1, 5))
def test_of_units_of_one_cost_the_first_go(order: list[Unit], drop: int, cost: int) -> None:
    assert Budget.of_units(order, drop).cut(order) == set(order[:drop])
    assert Budget(dict.fromkeys(order, cost), cost * drop).cut(order) == set(order[:drop])


def test_a_large_unit_brings_earlier_ones_back() -> None:
    a, b, c, d = UNITS[:4]
    budget = Budget({a: 1, b: 2, c: 5, d: 1}, 6)
    assert budget.cut([a, b, c, d]) == {a, c}  # of a and b the later one is superfluous first
    assert budget.cut([b, c]) == {b, c}
    assert Budget({a: 1, b: 2, c: 5}, 5).cut([a, b, c]) == {c}


def test_units_have_one_order_whatever_came_first() -> None:
    assert Budget.of_units(UNITS[::-1], 2).units == UNITS
    assert Budget.of_units(UNITS[::-1], 2) == Budget.of_units(UNITS, 2)


@pytest.mark.parametrize(
    ("costs", "target", "message"),
    [
        ({}, 1, "so much cannot be removed.*got 1, expected 1 to 0"),
        (dict.fromkeys(UNITS, 1), 9, "got 9, expected 1 to 8; remove less, or protect fewer"),
        (dict.fromkeys(UNITS, 1), 0, "got 0, expected 1 to 8"),
        (dict.fromkeys(UNITS, 7), 57, "got 57, expected 1 to 56"),
    ],
)
def test_what_cannot_be_met(costs: dict[Unit, int], target: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Budget(costs, target)


@pytest.mark.parametrize("stray", [("block", 0), ("mlp", 4)])
def test_a_unit_that_may_not_go_has_no_cost(stray: Any) -> None:
    with pytest.raises(KeyError):
        Budget.of_units(UNITS, 1).spent([stray])
