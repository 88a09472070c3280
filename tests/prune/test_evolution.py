from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint import dump_json, load_object
from compress.errors import BadInput, Corrupt
from compress.prune.evolution import Evolution, Evolved, evolve
from compress.prune.fitness import Removal, RemovalLoss, Unit
from compress.prune.search import last_k, random_choice, removable

UNITS = removable("block", 20)
COSTS = {unit: (unit[1] * 7 % 17) / 10 for unit in UNITS}
START = last_k(UNITS, 4)
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
        noise = random_choice(
            UNITS, 1, sum(index * 31**i for i, (_, index) in enumerate(sorted(removal)))
        )
        return cost + (COSTS[min(noise)] if tokens == 2048 else 0)


def test_the_search_gets_better_and_never_worse() -> None:
    result = evolve(Rugged(), UNITS, [START], Evolution(generations=60))
    assert list(result.history) == sorted(result.history, reverse=True)
    assert len(result.history) == 61
    assert result.fitness == result.history[-1] == Rugged().loss(result.removed, None)
    best = min(Rugged().loss(frozenset(each), None) for each in combinations(UNITS, 4))
    assert result.fitness == best < Rugged().loss(START, None)


def test_the_seed_alone_decides() -> None:
    first, again, other = (
        evolve(Rugged(), order, [START], Evolution(generations=5, offspring=4, seed=seed))
        for seed, order in ((0, UNITS), (0, UNITS[::-1]), (1, UNITS))
    )
    assert first == again
    assert first.history != other.history


def test_stages_thin_out_the_children() -> None:
    fitness = Rugged()
    settings = Evolution(generations=3, offspring=16, survivors=(4, 2, 1), tokens=(10, 100, 1000))
    evolve(fitness, UNITS, [START], settings)
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
    evolve(fitness, UNITS, [START], QUICK)
    for (budget, sets), (later, left) in zip(fitness.asked, fitness.asked[1:], strict=False):
        if (budget, later) == (2048, 32768):
            best = sorted(fitness.loss(each, 2048) for each in sets)[:2]
            assert all(fitness.loss(each, 2048) <= best[-1] for each in left if each in sets)


def test_no_set_is_measured_twice() -> None:
    fitness = Rugged()
    evolve(fitness, UNITS, [START], QUICK)
    pairs = [(tokens, each) for tokens, sets in fitness.asked for each in sets]
    assert len(pairs) == len(set(pairs))


def test_the_result_is_no_worse_than_any_start() -> None:
    """Even a start that little text shows as bad: starts skip the first stages."""
    starts = [random_choice(UNITS, 4, seed) for seed in range(6)]
    result = evolve(Rugged(), UNITS, starts, Evolution(generations=0, offspring=6))
    assert result.fitness == min(Rugged().loss(start, None) for start in starts)
    assert result.removed in starts


def test_counts_of_kinds_stay() -> None:
    units = [*removable("attention", 8), *removable("mlp", 8)]
    start = {("attention", 2), ("attention", 5), ("mlp", 3)}
    seen: list[Removal] = []

    def fitness(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        seen.extend(candidates)
        return [float(sum(index for _, index in each)) for each in candidates]

    result = evolve(fitness, units, [start], QUICK)
    assert result.removed == {("attention", 2), ("attention", 3), ("mlp", 2)}
    assert len(set(seen)) > 20
    for each in seen:
        assert sorted(kind for kind, _ in each) == ["attention", "attention", "mlp"]
        assert each <= set(units)


def test_ties_keep_the_parent() -> None:
    result = evolve(lambda sets, tokens=None: [1.0] * len(sets), UNITS, [START], QUICK)
    assert result == Evolved(START, 1.0, (1.0,) * 13)


def test_nothing_to_swap() -> None:
    whole = frozenset(UNITS)
    assert evolve(Rugged(), UNITS, [whole], QUICK).removed == whole


def test_the_number_of_generations_follows_from_the_task() -> None:
    result = evolve(Rugged(), UNITS, [START], Evolution(offspring=2))
    assert len(result.history) == 1 + math.ceil(4 * (17 - 4) / 1.5)


class Killed(Exception):
    pass


def dying(after: int) -> Callable[..., list[float]]:
    fitness = Rugged()

    def run(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        if len(fitness.asked) == after:
            raise Killed
        return fitness(candidates, tokens)

    return run


def test_an_interrupted_search_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = evolve(Rugged(), UNITS, [START], QUICK, journal=tmp_path / "whole.json")
    for after in range(0, 26, 3):
        journal = tmp_path / f"{after}.json"
        with pytest.raises(Killed):
            evolve(dying(after), UNITS, [START], QUICK, journal=journal)
        resumed = Rugged()
        assert evolve(resumed, UNITS, [START], QUICK, journal=journal) == whole
        assert journal.read_bytes() == (tmp_path / "whole.json").read_bytes()
        assert after == 0 or len(resumed.asked) < 26
    fitness = Rugged()
    assert evolve(fitness, UNITS, [START], QUICK, journal=tmp_path / "whole.json") == whole
    assert not fitness.asked


def test_a_longer_search_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    journal, longer = tmp_path / "j.json", Evolution(generations=20, offspring=8)
    short = evolve(Rugged(), UNITS, [START], QUICK, journal=journal)
    result = evolve(Rugged(), UNITS, [START], longer, journal=journal)
    assert result == evolve(Rugged(), UNITS, [START], longer)
    assert evolve(Rugged(), UNITS, [START], QUICK, journal=journal) == short
    assert result.history[:13] == short.history


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    evolve(Rugged(), UNITS, [START], QUICK, journal=journal, subject="model a")
    before = journal.read_bytes()
    other = Evolution(generations=12, offspring=8, seed=1)
    for units, starts, settings, subject in (
        (UNITS, [START], QUICK, "model b"),
        (UNITS, [START], other, "model a"),
        (UNITS, [random_choice(UNITS, 4, 0)], QUICK, "model a"),
        (removable("block", 21), [START], QUICK, "model a"),
    ):
        with pytest.raises(BadInput, match="the journal is that of another search"):
            evolve(Rugged(), units, starts, settings, journal=journal, subject=subject)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("history", [None, 3, [{"loss": 1}], [{"loss": "x", "removed": []}]])
def test_a_journal_that_is_none(history: object, tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    evolve(Rugged(), UNITS, [START], QUICK, journal=journal)
    journal.write_bytes(dump_json({**load_object(journal), "history": history}))
    with pytest.raises(Corrupt, match="not the journal of a search"):
        evolve(Rugged(), UNITS, [START], QUICK, journal=journal)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([], "as many units of each kind, got none"),
        ([[]], "as many units of each kind"),
        ([START, UNITS[:3]], "as many units of each kind"),
        ([[("block", 1)]], "a start removes a unit that may not go, got block 1"),
    ],
)
def test_starts_that_start_no_search(starts: list[list[Unit]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        evolve(Rugged(), UNITS, starts, QUICK)


def test_losses_that_are_not_finite() -> None:
    def lost(candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        return [math.inf if each >= START else 1.0 for each in candidates]

    assert evolve(lost, UNITS, [START], QUICK).fitness == 1.0
    with pytest.raises(BadInput, match="no set of units has a finite loss"):
        evolve(lambda sets, tokens=None: [math.inf] * len(sets), UNITS, [START], QUICK)


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
    units = removable("block", 6, ())
    pairs = [frozenset(pair) for pair in combinations(units, 2)]
    losses = loss(pairs)
    settings = Evolution(generations=6, offspring=6, survivors=(2, 1), tokens=(40, 160))
    worst = pairs[losses.index(max(losses))]
    result = evolve(loss, units, [worst], settings)
    assert (result.fitness, result.removed) == (min(losses), pairs[losses.index(min(losses))])
