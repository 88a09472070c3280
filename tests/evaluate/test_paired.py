from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from compress.errors import BadInput
from compress.evaluate.bootstrap import FEWEST, Interval
from compress.evaluate.paired import Comparison, compare, documents_needed
from compress.evaluate.tango import mcnemar, tango_interval

Z = stats.norm.ppf(0.975)


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """Of (log-likelihood, words) pairs, as lm-eval's weighted_perplexity."""
    return math.exp(-sum(loss for loss, _ in losses) / sum(words for _, words in losses))


def answers(lost: int, won: int, documents: int) -> tuple[list[int], list[int]]:
    """0/1 scores of reference and candidate; those that agree are half right, half wrong."""
    same = [i % 2 for i in range(documents - lost - won)]
    return [1] * lost + [0] * won + same, [0] * lost + [1] * won + same


def counted(lost: int, won: int, documents: int) -> Comparison:
    return compare(*answers(lost, won, documents), higher_is_better=True)


def differences(n: int, drop: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """Scores whose mean difference is drawn around ``drop`` with a deviation of 1."""
    random = np.random.default_rng(seed)
    reference = random.normal(0, 5, n)
    return reference.tolist(), (reference - random.normal(drop, 1, n)).tolist()


@st.composite
def counts(draw: st.DrawFn, most: int = 10**6) -> tuple[int, int, int]:
    documents = draw(st.integers(1, most))
    changed = draw(st.integers(0, documents))
    lost = draw(st.integers(0, changed))
    return lost, changed - lost, documents


def score(lost: int, won: int, n: int, difference: float) -> float:
    """Tango's statistic from a likelihood that is maximised by search."""

    def unlikelihood(q: float) -> float:
        shares = (q + difference, q, 1 - 2 * q - difference)
        terms = zip((lost, won, n - lost - won), shares, strict=True)
        return -sum(count * math.log(max(share, 1e-300)) for count, share in terms if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = optimize.minimize_scalar(
        unlikelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    ).x
    variance = 2 * q + difference - difference**2
    return (lost - won - n * difference) / math.sqrt(n * variance)


@pytest.mark.parametrize(
    ("lost", "won", "n"),
    [(1, 7, 21), (14, 6, 100), (3, 3, 50), (0, 4, 30), (9, 0, 30), (8, 4, 12), (250, 180, 1319)],
)
def test_tango_is_where_a_score_test_by_brute_force_begins_to_reject(
    lost: int, won: int, n: int
) -> None:
    found = tango_interval(lost, won, n)
    low, high = (
        optimize.brentq(lambda d, z=z: score(lost, won, n, d) - z, lower, upper)
        for z, lower, upper in (
            (Z, -1 + 1e-9, found.estimate - 1e-9),
            (-Z, found.estimate + 1e-9, 1 - 1e-9),
        )
    )
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_tango_is_as_published() -> None:
    """Fagerland, Lydersen, Laake 2014, Stat. Med. 33:2850: airway reactivity of 21 children."""
    found = tango_interval(1, 7, 21)
    assert (found.low, found.high) == pytest.approx((-0.517, -0.026), abs=5e-4)


@settings(deadline=None)
@given(counts())
@example((0, 0, 1))
@example((10**6, 0, 10**6))
@example((1, 0, 10**6))
@example((10**6 - 1, 1, 10**6))
@example((10**6 - 1, 0, 10**6))
@example((5 * 10**5, 5 * 10**5, 10**6))
def test_tango_holds_its_estimate_and_mirrors(numbers: tuple[int, int, int]) -> None:
    lost, won, n = numbers
    found, mirrored = tango_interval(lost, won, n), tango_interval(won, lost, n)
    assert found.estimate == (lost - won) / n
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    assert found.low < found.high
    assert (mirrored.low, mirrored.high) == (-found.high, -found.low)


@settings(deadline=None)
@given(counts(10**5), st.integers(2, 10))
def test_tango_shrinks_with_more_of_the_same(numbers: tuple[int, int, int], times: int) -> None:
    few, many = tango_interval(*numbers), tango_interval(*(times * count for count in numbers))
    assert many.high - many.low < few.high - few.low
    assert few.low <= many.low <= many.high <= few.high


@pytest.mark.parametrize("n", [1, 30, 10**6])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_no_change_at_all_still_leaves_doubt(n: int, confidence: float) -> None:
    z = stats.norm.ppf((1 + confidence) / 2)
    found = tango_interval(0, 0, n, confidence)
    assert found.high == -found.low == pytest.approx(z**2 / (n + z**2), rel=1e-12)


@pytest.mark.parametrize("n", [1, 9, 10**6])
def test_losing_every_document_leaves_doubt_on_one_side(n: int) -> None:
    found = tango_interval(n, 0, n)
    assert (found.estimate, found.high) == (1, 1)
    # All documents change, so it is Wilson's interval of the share of losses, from -1 to 1.
    wilson = stats.binomtest(n, n).proportion_ci(0.95, "wilson").low
    assert found.low == pytest.approx(2 * wilson - 1, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 0), (-1, 0, 5), (0, -1, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(lost: int, won: int, n: int) -> None:
    with pytest.raises(BadInput, match=f"got {lost} lost and {won} won of {n}"):
        tango_interval(lost, won, n)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (9, 2), (5, 5), (60, 90)])
def test_mcnemar_is_statsmodels(lost: int, won: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    expected = tables.mcnemar([[40, lost], [won, 17]], exact=True).pvalue if lost + won else 1
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-12)


def test_zeros_and_ones_are_counted() -> None:
    found = counted(9, 2, 41)
    assert found == Comparison(
        documents=41,
        reference=(9 + 15) / 41,
        candidate=(2 + 15) / 41,
        drop=tango_interval(9, 2, 41),
        lost=9,
        won=2,
        flips=11 / 41,
        p_value=mcnemar(9, 2),
        method="tango",
    )
    reference, candidate = answers(9, 2, 41)
    exchanged = compare(candidate, reference, higher_is_better=False)
    assert (exchanged.lost, exchanged.won, exchanged.drop) == (9, 2, found.drop)
    floats = compare([float(x) for x in reference], candidate, higher_is_better=True)
    assert floats == found


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_other_numbers_have_students_interval(higher_is_better: bool) -> None:
    reference, candidate = differences(30, 0.2)
    found = compare(reference, candidate, higher_is_better=higher_is_better, confidence=0.9)
    change = np.subtract(reference, candidate) * (1 if higher_is_better else -1)
    paired = stats.ttest_1samp(change, 0).confidence_interval(0.9)
    assert (found.method, found.p_value, found.drop.confidence) == ("student", None, 0.9)
    assert (found.drop.low, found.drop.high) == pytest.approx(tuple(paired))
    assert (found.reference, found.candidate) == pytest.approx(
        (np.mean(reference), np.mean(candidate))
    )
    assert (found.lost, found.won) == ((change > 0).sum(), (change < 0).sum())


def test_few_numbers_say_nothing() -> None:
    scores = differences(FEWEST - 1, -1)
    found = compare(*scores, higher_is_better=True)
    assert (found.drop.low, found.drop.high) == (-math.inf, math.inf)
    assert found.drop.verdict(1000) == "undecided"
    assert documents_needed(found, 1000) is None


@pytest.mark.parametrize("aggregate", [None, np.mean])
def test_the_same_numbers_do_not_prove_that_others_are_the_same(aggregate: Any) -> None:
    scores, _ = differences(20, 0)
    found = compare(scores, scores, higher_is_better=True, aggregate=aggregate)
    assert found.flips == found.drop.estimate == 0
    assert found.drop.verdict(0) == "undecided"
    span = max(scores) - min(scores)
    expected = math.inf if aggregate else span * tango_interval(0, 0, 20).high
    assert (found.drop.low, found.drop.high) == pytest.approx((-expected, expected))


def test_few_changes_are_bounded_as_whole_ones() -> None:
    """Partial credits that seldom differ: Student's interval alone passes far too often."""
    random = np.random.default_rng(0)
    runs, documents, drop = 400, 50, 0.02
    passed = 0
    for _ in range(runs):
        before = random.choice([0.25, 0.5, 1.0], documents)
        lost = random.random(documents) < 4 * drop
        after = np.where(lost, before - 0.25, before)
        found = compare(before.tolist(), after.tolist(), higher_is_better=True)
        passed += found.drop.verdict(drop) == "passed"
    assert passed <= most(0.025, runs) * runs


def test_an_aggregate_is_bootstrapped_over_documents() -> None:
    random = np.random.default_rng(0)
    words = random.integers(50, 150, 60)
    losses = -words * random.normal(3, 0.5, 60)
    worse = losses - words * 0.1
    worse[:6] += words[:6] * 0.2
    reference, candidate = (list(zip(x, words, strict=True)) for x in (losses, worse))
    found = compare(reference, candidate, higher_is_better=False, aggregate=perplexity)
    assert (found.method, found.p_value, found.lost, found.won) == ("bootstrap", None, 54, 6)
    assert found.reference == perplexity(reference)
    assert found.candidate == perplexity(candidate)
    assert found.drop.estimate == pytest.approx(found.candidate - found.reference)
    # The delta method, of a ratio of sums under the exponential.
    error = (
        found.candidate * (-worse / words.mean() - math.log(found.candidate) * words / words.mean())
        - found.reference
        * (-losses / words.mean() - math.log(found.reference) * words / words.mean())
    ).std() / math.sqrt(60)
    assert found.drop.high - found.drop.low == pytest.approx(2 * Z * error, rel=0.15)
    mirrored = compare(candidate, reference, higher_is_better=True, aggregate=perplexity)
    assert mirrored.drop == found.drop
    again = compare(reference, candidate, higher_is_better=False, aggregate=perplexity, seed=1)
    assert again.drop.estimate == found.drop.estimate
    assert again.drop.high != found.drop.high


def test_documents_whose_own_aggregate_overflows_count_as_unchanged() -> None:
    reference = [(-200.0, 100)] * 20 + [(-1e6, 10)]
    candidate = [(-210.0, 100)] * 20 + [(-1e6 - 1, 10)]
    found = compare(reference, candidate, higher_is_better=False, aggregate=perplexity)
    assert (found.lost, found.won) == (20, 0)


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ([], [], "no documents to compare"),
        ([1, 0], [1], "got 1 of the candidate, expected 2 as of the reference"),
        ([1.0, math.nan], [1, 1], "reference, document 1: a score is not finite, got nan"),
        ([1.0], [-math.inf], "candidate, document 0: a score is not finite, got -inf"),
        ([(0.5, 3)], [(math.nan, 3)], "candidate, document 0: .* not finite"),
    ],
)
def test_bad_scores_are_refused(
    reference: list[float], candidate: list[float], message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        compare(reference, candidate, higher_is_better=True)
    assert "\n" not in str(caught.value)


def test_an_infinite_aggregate_is_refused() -> None:
    with pytest.raises(BadInput, match="not finite"):
        compare([(-1e6, 1)] * 20, [(-2e6, 1)] * 20, higher_is_better=False, aggregate=perplexity)


@pytest.mark.parametrize(
    ("low", "estimate", "high", "expected"),
    [
        (-0.1, 0.0, 0.02, "passed"),
        (-0.1, 0.0, 0.021, "undecided"),
        (-0.1, 0.02, 0.1, "undecided"),
        (-0.1, 0.021, 0.1, "failed"),
        (-math.inf, -1, math.inf, "undecided"),
    ],
)
def test_verdicts(low: float, estimate: float, high: float, expected: str) -> None:
    comparison = replace(counted(0, 0, 9), drop=Interval(estimate, low, high, 0.95))
    assert comparison.drop.verdict(0.02) == expected


@pytest.mark.parametrize("n", [15, 60])
def test_tango_errs_as_rarely_as_it_says(n: int) -> None:
    """The exact chances of wrongly passing and failing, from every possible outcome."""
    table = [(lost, won) for lost in range(n + 1) for won in range(n - lost + 1)]
    intervals = [tango_interval(lost, won, n) for lost, won in table]
    low, high = (np.array([getattr(i, end) for i in intervals]) for end in ("low", "high"))
    outcomes = [(lost, won, n - lost - won) for lost, won in table]
    for drop in (0, 0.01, 0.05, 0.2):
        for won in (0.001, 0.02, 0.1, 0.3):
            chance = stats.multinomial.pmf(outcomes, n, [won + drop, won, 1 - 2 * won - drop])
            assert chance.sum() == pytest.approx(1)
            assert chance[high <= drop].sum() <= 0.031  # 0.025, and little more on the lattice
            assert chance[(low <= drop) & (drop <= high)].sum() >= 0.94


def most(rate: float, runs: int) -> float:
    """What a rate may reach by chance."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / runs)


def test_a_candidate_just_too_bad_rarely_passes() -> None:
    runs, n, max_drop = 1500, 40, 0.1
    random = np.random.default_rng(0)
    passed: dict[str, int] = {"tango": 0, "student": 0}
    for _ in range(runs):
        changes = random.choice([1, -1, 0], n, p=[0.2, 0.1, 0.7])
        lost, won = int((changes > 0).sum()), int((changes < 0).sum())
        shifts = random.normal(max_drop, 0.5, n)
        for found in (
            counted(lost, won, n),
            compare([0.0] * n, (-shifts).tolist(), higher_is_better=True),
        ):
            passed[found.method] += found.drop.verdict(max_drop) == "passed"
    assert 0.01 * runs < passed["tango"] <= most(0.025, runs) * runs
    assert 0.01 * runs < passed["student"] <= most(0.025, runs) * runs


def losses(n: int, seed: int) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """Documents whose candidate's perplexity is e^3.1 in truth, the reference's e^3."""
    random = np.random.default_rng(seed)
    words = random.integers(50, 150, n)
    before = -words * random.normal(3, 0.3, n)
    after = before - words * random.normal(0.1, 0.05, n)
    reference, candidate = (
        list(zip(x.tolist(), words.tolist(), strict=True)) for x in (before, after)
    )
    return reference, candidate


def bootstrapped(n: int, seed: int) -> Comparison:
    return compare(*losses(n, seed), higher_is_better=False, aggregate=perplexity, seed=seed)


@pytest.mark.parametrize("max_drop", [0.05, 0.08, 0.2])
def test_documents_needed_is_where_tangos_interval_gets_narrow_enough(max_drop: float) -> None:
    comparison = counted(9, 5, 100)
    needed = documents_needed(comparison, max_drop)
    assert needed is not None
    whole = 100 * math.ceil(needed / 100)  # the counts must stay whole numbers
    assert tango_interval(9 * whole // 100, 5 * whole // 100, whole).high <= max_drop
    short = whole - 100
    if short:
        assert tango_interval(9 * short // 100, 5 * short // 100, short).high > max_drop


@pytest.mark.parametrize("max_drop", [0.45, 0.6, 2, 50])
def test_documents_needed_is_where_students_interval_gets_narrow_enough(max_drop: float) -> None:
    comparison = compare(*differences(30, 0.1), higher_is_better=True)
    drop, needed = comparison.drop, documents_needed(comparison, max_drop)
    deviation = (drop.high - drop.estimate) * math.sqrt(30) / stats.t.ppf(0.975, 29)
    enough = FEWEST
    while drop.estimate + stats.t.ppf(0.975, enough - 1) * deviation / enough**0.5 > max_drop:
        enough += 1
    assert needed == pytest.approx(enough, abs=1)


def test_a_run_of_the_documents_needed_passes_every_other_time() -> None:
    random = np.random.default_rng(0)
    needed = documents_needed(counted(16, 8, 200), 0.07)
    assert needed is not None
    draws = random.multinomial(needed, [0.08, 0.04, 0.88], 300)
    passed = [counted(int(a), int(b), needed).drop.verdict(0.07) == "passed" for a, b, _ in draws]
    assert np.mean(passed) == pytest.approx(0.5, abs=0.1)

    comparison = compare(*differences(400, 0.1), higher_is_better=True)
    drop = comparison.drop.estimate
    needed = documents_needed(comparison, drop + 0.2)
    assert needed is not None
    runs = (compare(*differences(needed, drop, seed), higher_is_better=True) for seed in range(300))
    assert np.mean([run.drop.verdict(drop + 0.2) == "passed" for run in runs]) == pytest.approx(
        0.5, abs=0.1
    )


@pytest.mark.slow
def test_so_does_one_of_a_perplexity() -> None:
    comparison = bootstrapped(200, 1000)
    bound = math.exp(3.1) - math.exp(3) + 0.4
    needed = documents_needed(comparison, comparison.drop.estimate + 0.4)
    assert needed is not None
    passed = [bootstrapped(needed, seed).drop.verdict(bound) == "passed" for seed in range(150)]
    assert np.mean(passed) == pytest.approx(0.5, abs=0.15)


def test_no_number_of_documents_makes_a_worse_candidate_pass() -> None:
    found = counted(5, 3, 100)
    assert documents_needed(found, 0.01) is None
    assert documents_needed(found, 0.02) is None
    assert documents_needed(found, 0.02 + 1e-15) is None
    assert documents_needed(found, 1) == documents_needed(found, 7) == 1
    assert documents_needed(counted(0, 0, 50), 0) is None
