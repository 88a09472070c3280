"""Rules and searches on tiny models, against choices made in the plainest way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress.errors import BadInput
from compress.progress import Silent, Step
from compress.prune import (
    KINDS,
    MEASURES,
    PROPOSING,
    RULES,
    SEARCHES,
    Budget,
    Evolution,
    Removal,
    RemovalLoss,
    Selection,
    Units,
    check_rules,
    find_units,
    savings,
    select,
    window_angular,
    without,
)
from compress.signals import SCORERS, SCORERS_DEFAULT, collect, find_blocks

BLOCKS = 6
TEXT = torch.randint(97, (5, 56), generator=torch.Generator().manual_seed(1))
TOKENS, HELDOUT = TEXT[:3], TEXT[3:]
QUICK = Evolution(generations=3, offspring=6, survivors=(2, 1), tokens=(56, 168))


@pytest.fixture(scope="module")
def directory(make_family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_family("llama", path)
    return path


@pytest.fixture(scope="module")
def llama(directory: Path) -> Any:
    return room.open(directory).load_model(dtype="float32").eval()


def budget_of(units: Units, drop: int, protect: Sequence[int] = (0,)) -> Budget:
    return Budget.of_units(units.free(protect), drop)


def chosen(model: Any, granularity: str, drop: int = 2, **options: Any) -> Selection:
    units = find_units(model, granularity)
    return select(model, units, budget_of(units, drop), TOKENS, HELDOUT, **options)


def removed_by(selection: Selection, rule: str) -> Removal:
    [found] = [each.removed for each in selection.candidates if each.rule == rule]
    return found


@torch.no_grad()
def plain_loss(model: Any, units: Units, removal: Removal, metric: str, text: Any) -> float:
    full = model(text).logits.double().log_softmax(-1)
    with without(model, removal, units.parts):
        pruned = model(text).logits.double().log_softmax(-1)
    if metric == "kl":
        return float((full.exp() * (full - pruned)).sum(-1).mean())
    return math.exp(-float(pruned[:, :-1].gather(-1, text[:, 1:, None]).mean()))


@pytest.mark.parametrize("granularity", KINDS)
def test_the_lowest_scores_go(granularity: str, llama: Any) -> None:
    units = find_units(llama, granularity)
    tables = {
        kind: collect(llama, TOKENS, parts=units.to_score(llama, kind), scorers=SCORERS)
        for kind in units.kinds
    }
    for scorer in SCORERS:
        selection = chosen(llama, granularity, scorer=scorer)
        lowest = sorted(
            (place, kind, block)
            for kind, table in tables.items()
            for block, place in enumerate(table.places(scorer))
            if block != 0
        )
        assert selection.removed == {(kind, block) for _, kind, block in lowest[:2]}
        asked = [each for each in SCORERS if each in (*SCORERS_DEFAULT, scorer)]
        assert [each.rule for each in selection.candidates] == asked
        assert removed_by(selection, scorer) == selection.removed
        assert set(selection.tables) == set(units.kinds)
        assert all(list(table.values) == asked for table in selection.tables.values())
        assert all(each.kl is None and len(each.removed) == 2 for each in selection.candidates)
        assert selection.search is None


@pytest.mark.parametrize("granularity", KINDS)
@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_leave_one_out_is_brute_force(metric: str, granularity: str, llama: Any) -> None:
    units = find_units(llama, granularity)
    scorer = f"leave_one_out_{metric}"
    selection = chosen(llama, granularity, drop=3, scorer=scorer)
    losses = {
        unit: plain_loss(llama, units, frozenset({unit}), metric, TOKENS)
        for unit in units.free((0,))
    }
    assert selection.removed == set(sorted(losses, key=lambda unit: losses[unit])[:3])
    assert removed_by(selection, scorer) == selection.removed
    assert len(selection.candidates) == len(SCORERS_DEFAULT) + 1


@pytest.mark.parametrize("granularity", KINDS)
def test_the_last_go(granularity: str, llama: Any) -> None:
    removed = chosen(llama, granularity, scorer="last_k").removed
    expected = {"joint": {("attention", 5), ("mlp", 5)}}
    assert removed == expected.get(granularity, {(granularity, 4), (granularity, 5)})


def test_random_is_seeded(llama: Any) -> None:
    found = [chosen(llama, "block", scorer="random", seed=seed).removed for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1
    assert all(("block", 0) not in each and len(each) == 2 for each in found)


def test_the_window_is_that_over_which_a_state_turns_least(llama: Any) -> None:
    for drop in (1, 2, 3):
        distances = window_angular(llama, TOKENS, drop)
        start = min(range(1, BLOCKS - drop + 1), key=lambda first: distances[first])
        removed = chosen(llama, "block", drop, scorer="window_angular").removed
        assert removed == {("block", start + i) for i in range(drop)}


def test_windows_need_adjacent_blocks(llama: Any) -> None:
    units = find_units(llama, "block")
    budget = budget_of(units, 3, (0, 3))
    with pytest.raises(BadInput, match="no adjacent blocks may all go"):
        select(llama, units, budget, TOKENS, scorer="window_angular")


def test_joint_mixes_kinds_by_their_scores(llama: Any) -> None:
    """Scores of attention and MLP stand in one line: neither has a share of its own."""
    counts = set()
    for scorer in ("norm_ratio", "cosine", "leave_one_out_kl", "knn_entropy"):
        for drop in (2, 3, 5):
            removed = chosen(llama, "joint", drop, scorer=scorer).removed
            assert len(removed) == drop
            counts.add((drop, sum(kind == "mlp" for kind, _ in removed)))
    assert any(0 < mlps < drop for drop, mlps in counts)
    assert len(counts) > 3


@pytest.mark.parametrize("granularity", ["block", "joint"])
def test_best_scorer_takes_the_set_that_costs_least(granularity: str, llama: Any) -> None:
    selection = chosen(llama, granularity, scorer="effective_rank", search="best_scorer")
    units = find_units(llama, granularity)
    assert [each.rule for each in selection.candidates] == list(PROPOSING)
    for each in selection.candidates:
        expected = plain_loss(llama, units, each.removed, "kl", TOKENS)
        assert each.kl == pytest.approx(expected, rel=1e-4)
    best = min(selection.candidates, key=lambda each: each.kl or 0)
    one_shot = removed_by(selection, "effective_rank")
    assert best.removed != one_shot
    search = selection.search
    assert search is not None
    assert (search.method, search.history) == ("best_scorer", ())
    assert_arbitrated(llama, units, selection, one_shot, best.removed)


def test_best_scorer_knows_the_rule_that_was_asked_for(llama: Any) -> None:
    selection = chosen(llama, "block", scorer="last_k", search="best_scorer")
    assert [each.rule for each in selection.candidates] == [*PROPOSING, "last_k"]
    assert all(each.kl is not None for each in selection.candidates)


def assert_arbitrated(
    model: Any,
    units: Units,
    selection: Selection,
    one_shot: Removal,
    found: Removal,
    heldout: Any = HELDOUT,
) -> None:
    """The two KLs are those of the two sets on the held-out text, and the lower one decided."""
    search = selection.search
    assert search is not None
    losses = [plain_loss(model, units, each, "kl", heldout) for each in (one_shot, found)]
    assert [search.one_shot_kl, search.found_kl] == pytest.approx(losses, rel=1e-4)
    kept = "found" if losses[1] < losses[0] and found != one_shot else "one_shot"
    assert search.kept == kept
    assert selection.removed == (found if kept == "found" else one_shot)


@pytest.mark.parametrize("granularity", ["block", "joint"])
def test_greedy_takes_the_best_next_unit(granularity: str, llama: Any) -> None:
    units = find_units(llama, granularity)
    selection = chosen(llama, granularity, 3, scorer="effective_rank", search="greedy")
    gone: Removal = frozenset()
    for _ in range(3):
        further = [gone | {unit} for unit in units.free((0,)) if unit not in gone]
        gone = min(further, key=lambda each: plain_loss(llama, units, each, "kl", TOKENS))
    assert_arbitrated(llama, units, selection, removed_by(selection, "effective_rank"), gone)
    assert len(selection.candidates) == len(SCORERS_DEFAULT) + 1


@pytest.mark.parametrize("granularity", ["block", "attention", "joint"])
def test_iterative_scores_the_model_that_is_left(granularity: str, llama: Any) -> None:
    units = find_units(llama, granularity)
    differ = False
    for scorer in ("bucket_entropy", "renyi_entropy", "effective_rank"):
        selection = chosen(llama, granularity, 3, scorer=scorer, search="iterative")
        gone: Removal = frozenset()
        for _ in range(3):
            with without(llama, gone, units.parts):
                places = {
                    (kind, block): place
                    for kind in units.kinds
                    for block, place in enumerate(
                        collect(
                            llama, TOKENS, parts=units.to_score(llama, kind), scorers=[scorer]
                        ).places(scorer)
                    )
                }
            left = [unit for unit in units.free((0,)) if unit not in gone]
            gone |= {min(left, key=lambda unit: (places[unit], unit))}
        one_shot = removed_by(selection, scorer)
        assert_arbitrated(llama, units, selection, one_shot, gone)
        differ |= gone != one_shot
    assert differ


@pytest.mark.parametrize("granularity", ["block", "joint"])
def test_evolution_is_no_worse_than_any_rule(granularity: str, llama: Any) -> None:
    units = find_units(llama, granularity)
    settings = Evolution(generations=8, offspring=10, survivors=(3, 1), tokens=(56, 168))
    options = {"scorer": "last_k", "search": "evolutionary", "evolution": settings}
    selection = chosen(llama, granularity, **options)
    search = selection.search
    assert search is not None
    assert search.method == "evolutionary"
    assert len(search.history) == 9
    assert list(search.history) == sorted(search.history, reverse=True)
    assert [each.rule for each in selection.candidates] == [*PROPOSING, "last_k"]
    losses = {}
    for each in selection.candidates:
        losses[each.removed] = plain_loss(llama, units, each.removed, "kl", TOKENS)
        assert each.kl == pytest.approx(losses[each.removed], rel=1e-4)
    one_shot = min(losses, key=lambda removal: losses[removal])
    assert search.history[0] <= min(each.kl or 0 for each in selection.candidates)
    sets = [frozenset(pair) for pair in combinations(units.free((0,)), 2)]
    optimum = min(sets, key=lambda each: plain_loss(llama, units, each, "kl", TOKENS))
    best = plain_loss(llama, units, optimum, "kl", TOKENS)
    assert search.history[-1] == pytest.approx(best, rel=1e-4)
    assert_arbitrated(llama, units, selection, one_shot, optimum)


def test_the_arbiter_keeps_what_is_better_on_unseen_text(llama: Any) -> None:
    """The same search, decided by held-out texts that prefer the one and the other."""
    units = find_units(llama, "block")
    budget = budget_of(units, 2)
    one_shot = select(llama, units, budget, TOKENS, scorer="nuclear_norm").removed
    kl = RemovalLoss(llama, TOKENS)
    best = min(map(frozenset, combinations(budget.units, 2)), key=lambda each: kl([each])[0])
    assert best != one_shot
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(97, (100, 56), generator=generator)
    rows = RemovalLoss(llama, texts).by_sequence([one_shot, best])
    gains = [worse - better for worse, better in zip(*rows, strict=True)]
    settings = Evolution(generations=8, offspring=10, survivors=(3, 1), tokens=(56, 168))
    kept = set()
    for row in (gains.index(min(gains)), gains.index(max(gains))):
        selection = select(
            llama,
            units,
            budget,
            TOKENS,
            texts[row, None],
            scorer="nuclear_norm",
            search="greedy",
            evolution=settings,
        )
        assert selection.search is not None
        kept.add(selection.search.kept)
        found = selection.removed
        losses = selection.search.one_shot_kl, selection.search.found_kl
        assert (losses[1] < losses[0]) == (found != one_shot)
    assert kept == {"found", "one_shot"}


@pytest.mark.parametrize("search", [each for each in SEARCHES if each != "one_shot"])
def test_without_held_out_text_what_was_found_stays(search: str, llama: Any) -> None:
    units = find_units(llama, "block")
    budget = budget_of(units, 2)
    options = {"scorer": "cosine", "search": search, "evolution": QUICK}
    alone = select(llama, units, budget, TOKENS, **options)
    assert alone.search is None
    assert len(alone.removed) == 2
    judged = select(llama, units, budget, TOKENS, HELDOUT, **options)
    assert judged.search is not None
    assert alone.candidates == judged.candidates
    assert alone.removed == judged.removed or judged.search.kept == "one_shot"


@pytest.mark.parametrize(
    ("scorer", "search", "measure", "granularity"),
    [
        *(("cosine", "one_shot", measure, kind) for measure in MEASURES for kind in KINDS),
        ("leave_one_out_kl", "one_shot", "flops", "joint"),
        ("last_k", "best_scorer", "parameters", "joint"),
        ("cosine", "iterative", "coded_bytes", "joint"),
        ("cosine", "greedy", "coded_bytes", "block"),
        ("cosine", "greedy", "flops", "joint"),
        ("random", "evolutionary", "coded_bytes", "joint"),
    ],
)
def test_budgets_are_met_and_no_more(
    scorer: str, search: str, measure: str, granularity: str, directory: Path, llama: Any
) -> None:
    units = find_units(llama, granularity)
    costs, total = savings(measure, llama, room.open(directory), units, 56)
    budget = Budget({unit: costs[unit] for unit in units.free((0,))}, math.ceil(0.21 * total))
    options = {"scorer": scorer, "search": search, "evolution": QUICK}
    selection = select(llama, units, budget, TOKENS, HELDOUT, **options)
    for removal in (selection.removed, *(each.removed for each in selection.candidates)):
        assert removal <= set(budget.costs)
        assert budget.spent(removal) >= 0.21 * total
        assert all(budget.spent(removal - {unit}) < 0.21 * total for unit in removal)


def test_a_window_is_as_large_as_the_budget_asks(directory: Path, llama: Any) -> None:
    units = find_units(llama, "block")
    costs, total = savings("coded_bytes", llama, room.open(directory), units, 56)
    budget = Budget({unit: costs[unit] for unit in units.free((0,))}, math.ceil(0.4 * total))
    removed = select(llama, units, budget, TOKENS, scorer="window_angular").removed
    indices = sorted(index for _, index in removed)
    assert indices == list(range(indices[0], indices[0] + 3))
    assert budget.met(removed)


class Killed(Exception):
    pass


class Mortal(Silent):
    """Dies when the n-th measurement of removals begins; counts them."""

    def __init__(self, dies: int | None = None) -> None:
        self.dies, self.begun = dies, 0

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Step]:
        if label.startswith("trying"):
            if self.begun == self.dies:
                raise Killed
            self.begun += 1
        yield self


@pytest.mark.parametrize(
    ("scorer", "search"),
    [
        ("leave_one_out_perplexity", "one_shot"),
        ("leave_one_out_kl", "greedy"),
        ("cosine", "best_scorer"),
        ("window_angular", "evolutionary"),
    ],
)
def test_an_interrupted_selection_goes_on(
    scorer: str, search: str, llama: Any, tmp_path: Path
) -> None:
    options = {"scorer": scorer, "search": search, "evolution": QUICK}
    whole = Mortal()
    expected = chosen(llama, "block", **options, progress=whole)
    assert whole.begun >= 1
    for dies in range(0, whole.begun, 1 if search == "best_scorer" else 3):
        journal = tmp_path / str(dies)
        journal.mkdir()
        with pytest.raises(Killed):
            chosen(llama, "block", **options, journal=journal, progress=Mortal(dies))
        rest = Mortal()
        assert chosen(llama, "block", **options, journal=journal, progress=rest) == expected
        arbiter = int(search != "one_shot")  # two sets, which no journal holds
        assert rest.begun == max(whole.begun - dies, arbiter)
    again = Mortal()
    assert chosen(llama, "block", **options, journal=journal, progress=again) == expected
    assert again.begun == arbiter


def test_threads_change_nothing(llama: Any) -> None:
    options = {"scorer": "matrix_entropy", "search": "iterative"}
    one, three = (chosen(llama, "joint", 3, **options, threads=threads) for threads in (1, 3))
    assert one == three


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    logits = llama(TOKENS).logits
    for scorer, search in (("window_angular", "evolutionary"), ("cosine", "iterative")):
        chosen(llama, "block", scorer=scorer, search=search, evolution=QUICK)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in find_blocks(llama))
    assert torch.equal(llama(TOKENS).logits, logits)


@pytest.mark.parametrize(
    ("scorer", "search", "granularity", "message"),
    [
        ("cosin", "one_shot", "block", "no such rule 'cosin'; did you mean 'cosine'"),
        ("cosine", "greed", "block", "no such rule 'greed'; did you mean 'greedy'"),
        ("window_angular", "one_shot", "mlp", "windows are of whole blocks, got mlp; granularity"),
        ("window_angular", "greedy", "joint", "whole blocks, got attention, mlp; granularity: bl"),
        ("random", "iterative", "block", "'random' has no scores to take anew.*one of knn_entropy"),
        ("last_k", "iterative", "block", "'last_k' has no scores to take anew"),
        ("window_angular", "iterative", "block", "'window_angular' has no scores to take anew"),
        ("leave_one_out_kl", "iterative", "mlp", "no scores to take anew.*; search: greedy"),
    ],
)
def test_rules_that_do_not_fit(
    scorer: str, search: str, granularity: str, message: str, llama: Any
) -> None:
    with pytest.raises(BadInput, match=message):
        check_rules(scorer, search, KINDS[granularity])
    with pytest.raises(BadInput, match=message):
        chosen(llama, granularity, scorer=scorer, search=search)


@pytest.mark.parametrize("granularity", KINDS)
def test_all_other_rules_fit(granularity: str) -> None:
    for scorer in RULES:
        for search in SEARCHES:
            if search == "iterative" and scorer not in SCORERS:
                continue
            if scorer == "window_angular" and granularity != "block":
                continue
            check_rules(scorer, search, KINDS[granularity])


def test_what_breaks_the_model_stays(make_family: Callable[..., Any], tmp_path: Path) -> None:
    """Whoever measures leaves block 4 alone, without which nothing finite comes out."""
    model = make_family("llama", tmp_path)
    blocks = find_blocks(model)
    mark = torch.zeros(32)
    mark[0] = 1000.0

    def add(module: Any, args: Any, output: Any) -> Any:
        return output + mark

    def need(module: Any, args: Any, output: Any) -> Any:
        return output - mark if output[..., 0].min() > 500 else output * torch.nan

    blocks[4].mlp.register_forward_hook(add)
    blocks[5].register_forward_hook(need)
    units = find_units(model, "block")
    budget = budget_of(units, 2, (0, 5))
    for scorer, search in (
        ("leave_one_out_kl", "one_shot"),
        ("leave_one_out_perplexity", "one_shot"),
        ("last_k", "greedy"),
        ("last_k", "best_scorer"),
        ("last_k", "evolutionary"),
    ):
        options = {"scorer": scorer, "search": search, "evolution": QUICK}
        selection = select(model, units, budget, TOKENS, HELDOUT, **options)
        assert ("block", 4) not in selection.removed
        if search in ("greedy", "best_scorer"):
            assert selection.search is not None
            assert selection.search.one_shot_kl == math.inf > selection.search.found_kl
