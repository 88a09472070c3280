from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from compress.errors import BadInput
from compress.evaluate.bootstrap import FEWEST, Interval, bootstrap_interval


def mean(x: np.ndarray, axis: int) -> Any:
    return x.mean(axis)


def ratio(a: np.ndarray, b: np.ndarray, axis: int) -> Any:
    return a.sum(axis) / b.sum(axis)


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize("n", [12, 300])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_of_a_mean_it_is_about_students_interval(n: int, confidence: float) -> None:
    x = normal(n)
    student = stats.t.interval(confidence, n - 1, x.mean(), stats.sem(x))
    found = bootstrap_interval(mean, [x], confidence=confidence, resamples=20_000)
    assert found.estimate == x.mean()
    assert found.confidence == confidence
    assert (found.low, found.high) == pytest.approx(student, abs=0.08 * (student[1] - student[0]))
    assert found.high - found.low == pytest.approx(student[1] - student[0], rel=0.02)


def test_skewed_data_have_the_longer_arm_on_the_side_of_their_tail() -> None:
    found = bootstrap_interval(mean, [np.random.default_rng(0).exponential(size=40)])
    assert found.high - found.estimate > 1.1 * (found.estimate - found.low)


def test_documents_are_resampled_as_a_whole() -> None:
    a = np.exp(normal(50))
    noise = 1 + 0.01 * normal(50, seed=1)
    paired = bootstrap_interval(ratio, [a * noise, a])
    apart = bootstrap_interval(ratio, [(a * noise)[::-1], a])
    assert paired.low < 1 < paired.high
    assert apart.high - apart.low > 20 * (paired.high - paired.low)


def test_the_seed_decides_everything() -> None:
    x = normal(30)
    assert bootstrap_interval(mean, [x], seed=1) == bootstrap_interval(mean, [x], seed=1)
    assert bootstrap_interval(mean, [x], seed=1) != bootstrap_interval(mean, [x], seed=2)


@pytest.mark.parametrize("n", [1, 2, FEWEST - 1])
def test_few_documents_say_nothing(n: int) -> None:
    x = normal(n)
    assert bootstrap_interval(mean, [x]) == Interval(x.mean(), -math.inf, math.inf, 0.95)


def test_enough_documents_say_something() -> None:
    found = bootstrap_interval(mean, [normal(FEWEST)])
    assert math.isfinite(found.low)
    assert math.isfinite(found.high)


def test_constant_rows_give_a_point() -> None:
    found = bootstrap_interval(ratio, [np.full(20, 3.0), np.full(20, 2.0)])
    assert found == Interval(1.5, 1.5, 1.5, 0.95)


def test_where_bca_is_undefined_the_percentiles_remain() -> None:
    def distinct(rows: np.ndarray, axis: int) -> Any:  # every resample has fewer than all rows
        return np.apply_along_axis(lambda row: float(len(set(row.tolist()))), axis, rows)

    found = bootstrap_interval(distinct, [np.arange(30)])
    assert found.high == found.estimate == 30
    assert 11 <= found.low <= 18  # 19.2 ± 1.7


def test_a_statistic_that_some_documents_lack_has_no_interval() -> None:
    x = np.array([1.0] + 19 * [0.0])  # a third of the resamples miss the one
    found = bootstrap_interval(ratio, [np.ones(20), x])
    assert found == Interval(20, -math.inf, math.inf, 0.95)


@pytest.mark.parametrize("n", [2_000, 50_000])
def test_memory_and_time_stay_bounded(n: int) -> None:
    sizes = []

    def watched(x: np.ndarray, axis: int) -> Any:
        sizes.append(x.size)
        return x.mean(axis)

    bootstrap_interval(watched, [normal(n)], resamples=200)
    assert max(sizes) <= 1 << 20
    assert sum(sizes) <= (200 + 2000 + 10) * n


def test_coverage_of_a_ratio_of_sums() -> None:
    random = np.random.default_rng(0)
    runs, covered = 400, 0
    for seed in range(runs):
        tokens = np.exp(random.normal(5, 0.5, 40))
        losses = tokens * random.normal(0.1, 0.05, 40)
        found = bootstrap_interval(ratio, [losses, tokens], seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert covered / runs >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "there are no documents"),
        ([np.zeros(0)], "there are no documents"),
        ([np.zeros(3), np.zeros(4)], r"differ in their number of documents, got \[3, 4\]"),
        ([np.array([0.0, np.nan])], "document 1: a value is not finite, got nan"),
        ([np.zeros(2), np.array([-np.inf, 0])], "document 0: a value is not finite, got -inf"),
    ],
)
def test_bad_columns_are_refused(columns: list[np.ndarray], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bootstrap_interval(lambda *columns, axis: columns[0].sum(axis), columns)


def test_a_statistic_that_is_not_finite_is_refused() -> None:
    with np.errstate(divide="ignore"), pytest.raises(BadInput, match="not finite, got inf"):
        bootstrap_interval(ratio, [np.ones(20), np.zeros(20)])
