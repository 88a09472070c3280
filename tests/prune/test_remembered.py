from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint import dump_json, load_object
from compress.errors import BadInput, Corrupt
from compress.prune.budget import Budget
from compress.prune.evolution import Evolution, evolve
from compress.prune.fitness import Removal, Unit
from compress.prune.remembered import Remembered
from compress.prune.search import greedy

UNITS: list[Unit] = [("block", i) for i in range(12)]
BUDGET = Budget.of_units(UNITS, 4)
QUICK = Evolution(generations=6, offspring=8)


class Killed(Exception):
    pass


class Loss:
    """A loss of no pattern; dies at its n-th call, and knows what it was asked."""

    def __init__(self, dies: int | None = None) -> None:
        self.dies, self.asked = dies, list[tuple[Removal, int | None]]()
        self.calls = 0

    def __call__(self, candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        if self.calls == self.dies:
            raise Killed
        self.calls += 1
        self.asked += [(each, tokens) for each in candidates]
        return [self.of(each, tokens) for each in candidates]

    def of(self, removal: Removal, tokens: int | None) -> float:
        key = sum(3**index for _, index in removal)
        if key % 17 == 0:
            return math.inf
        return math.sin(key + 0.1 * (tokens == 2048)) / 3 + 1


def one(*blocks: int) -> Removal:
    return frozenset(("block", i) for i in blocks)


def searched(loss: Loss, journal: Path | None, method: str) -> Any:
    remembered = Remembered(loss, journal, "the model")
    if method == "greedy":
        return greedy(remembered, BUDGET)
    return evolve(remembered, BUDGET, [one(0, 1, 2, 3)], QUICK)


@pytest.mark.parametrize("method", ["greedy", "evolution"])
def test_a_search_killed_anywhere_ends_as_an_undisturbed_one(method: str, tmp_path: Path) -> None:
    whole = Loss()
    expected = searched(whole, tmp_path / "whole.json", method)
    assert whole.calls > 3
    for dies in range(0, whole.calls, 1 if method == "greedy" else 3):
        journal = tmp_path / f"{dies}.json"
        before = Loss(dies)
        with pytest.raises(Killed):
            searched(before, journal, method)
        assert journal.exists() == (dies > 0)
        after = Loss()
        assert searched(after, journal, method) == expected
        assert before.asked + after.asked == whole.asked  # nothing twice, and nothing else
        assert journal.read_bytes() == (tmp_path / "whole.json").read_bytes()
    again = Loss(0)
    assert searched(again, tmp_path / "whole.json", method) == expected


def test_killed_again_and_again(tmp_path: Path) -> None:
    journal, asked = tmp_path / "journal.json", []
    while True:
        loss = Loss(1)
        try:
            found = searched(loss, journal, "evolution")
        except Killed:
            asked += loss.asked
        else:
            asked += loss.asked
            break
    assert found == searched(Loss(), None, "evolution")
    assert len(asked) == len(set(asked))


asked_for = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from([None, 10, 2048]))
)


@given(asked_for)
def test_answers_are_those_of_the_loss_and_nothing_is_measured_twice(
    questions: list[tuple[list[int], int | None]],
) -> None:
    loss = Loss()
    remembered = Remembered(loss)
    for blocks, tokens in questions:
        sets = [one(*blocks), one(0), one(*blocks)]
        assert remembered(sets, tokens) == [loss.of(each, tokens) for each in sets]
    assert len(loss.asked) == len(set(loss.asked))
    assert remembered([]) == []


def test_a_question_that_is_answered_leaves_the_journal_alone(tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    remembered = Remembered(Loss(), journal)
    remembered([])
    assert not journal.exists()
    remembered([one(1)])
    journal.unlink()
    remembered([one(1), one(1)])
    assert not journal.exists()
    remembered([one(1)], 5)
    assert journal.exists()


def test_every_loss_survives_the_journal(tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    losses = [math.inf, -math.inf, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 3.0]
    sets = [one(i) for i in range(len(losses))]
    Remembered(lambda candidates, tokens=None: losses, journal)(sets)

    def never(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        raise AssertionError

    found = Remembered(never, journal)(sets)
    assert list(map(repr, found)) == list(map(repr, losses))


def test_both_kinds_of_a_block_are_two_units(tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    sets = [frozenset({("attention", 1)}), frozenset({("mlp", 1)}), one(1), frozenset()]
    Remembered(lambda candidates, tokens=None: [1.0, 2.0, 3.0, 4.0], journal)(sets)
    resumed = Remembered(Loss(0), journal)
    assert resumed(sets[::-1]) == [4.0, 3.0, 2.0, 1.0]
    with pytest.raises(Killed):
        resumed(sets, 10)  # other tokens are another question


def test_the_journal_of_another_subject_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    Remembered(Loss(), journal, "model a")([one(1)])
    before = journal.read_bytes()
    with pytest.raises(
        BadInput, match="journal.json: .*of another search, got model a, expected model b; remove"
    ):
        Remembered(Loss(), journal, "model b")
    assert journal.read_bytes() == before
    assert Remembered(Loss(0), journal, "model a")([one(1)]) == [Loss().of(one(1), None)]


ENTRY = {"loss": "1.0", "removed": [["block", 1]], "tokens": None}


@pytest.mark.parametrize(
    "losses",
    [
        None,
        3,
        [1],
        [{"loss": "1.0", "removed": [["block", 1]]}],
        [{**ENTRY, "loss": "x"}],
        [{**ENTRY, "loss": None}],
        [{**ENTRY, "removed": 5}],
        [{**ENTRY, "removed": [["block"]]}],
        [{**ENTRY, "removed": [["block", "one"]]}],
        [{**ENTRY, "tokens": [1]}],
    ],
)
def test_a_damaged_journal(losses: object, tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    Remembered(Loss(), journal)([one(1)])
    journal.write_bytes(dump_json({**load_object(journal), "losses": losses}))
    with pytest.raises(Corrupt, match="journal.json: not the journal of a search"):
        Remembered(Loss(), journal)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"subject": ""}', b"\xff"])
def test_what_is_no_journal_at_all(content: bytes, tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    journal.write_bytes(content)
    with pytest.raises(Corrupt, match="journal.json"):
        Remembered(Loss(), journal)


def test_a_search_does_not_take_up_what_was_measured_on_another_text(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    from compress.prune import Budget, find_units, select

    model = make_family("llama", tmp_path / "model")
    units = find_units(model, "block")
    tokens = torch.arange(4 * 56).reshape(4, 56) * 7 % 97
    budget = Budget.of_units(units.free(), 1)
    options = {"scorer": "leave_one_out_kl", "journal": tmp_path, "subject": "model"}
    select(model, units, budget, tokens[:2], **options)
    select(model, units, budget, tokens[:2], **options)
    for other in ({"tokens": tokens[2:]}, {"subject": "another"}):
        with pytest.raises(BadInput, match="the journal is that of another search"):
            select(model, units, budget, **{"tokens": tokens[:2], **options, **other})
