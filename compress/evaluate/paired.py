"""How much worse a candidate is than its reference on the same documents, and how sure that is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import BadInput
from compress.evaluate.bootstrap import FEWEST, Interval, bootstrap_interval
from compress.evaluate.tango import mcnemar, score_variance, tango_interval

Method = Literal["tango", "student", "bootstrap"]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same documents.

    ``reference`` and ``candidate``: the metric of each. ``drop``: how much worse the candidate is,
    in the metric's unit, negative where it is better. ``lost`` and ``won``: how many documents got
    worse and better (for 0/1 metrics: right to wrong, wrong to right); ``flips``: their share of
    all (arXiv 2407.09141). ``p_value``: of McNemar's test, for 0/1 metrics only. ``method``: where
    ``drop`` comes from.
    """

    documents: int
    reference: float
    candidate: float
    drop: Interval
    lost: int
    won: int
    flips: float
    p_value: float | None
    method: Method


def compare(
    reference: Sequence[Any],
    candidate: Sequence[Any],
    *,
    higher_is_better: bool,
    aggregate: Callable[[list[Any]], float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two models' scores; ``reference[i]`` and ``candidate[i]`` are of one document.

    Without ``aggregate`` the metric is the mean. Scores of 0 and 1 only: `tango_interval` and
    `mcnemar`. Other numbers: Student's t interval of the mean difference, infinite for fewer than
    `FEWEST` documents. With ``aggregate``, a function of a list of scores of any kind:
    `bootstrap_interval` of the difference of the aggregates; a document got worse if the aggregate
    of it alone did. Both trust the changes they see, so where fewer than `FEWEST` documents changed
    the one is widened to what `tango_interval` gives for as many, times the range of all scores,
    and the other is infinite. Raises `BadInput` for no documents, lists of
    different lengths, and scores or aggregates that are not finite.
    """
    documents = len(reference)
    if len(candidate) != documents:
        raise BadInput(
            "reference and candidate were scored on different documents",
            got=f"{len(candidate)} of the candidate",
            expected=f"{documents} as of the reference",
        )
    if not documents:
        raise BadInput("there are no documents to compare")
    for role, scores in (("reference", reference), ("candidate", candidate)):
        for document, score in enumerate(scores):
            if not _finite(score):
                where = f"{role}, document {document}"
                raise BadInput("a score is not finite", where=where, got=score)
    sign = 1 if higher_is_better else -1
    value = _guarded(aggregate or _mean)
    worse = [
        sign * (value([before]) - value([after]))
        for before, after in zip(reference, candidate, strict=True)
    ]
    lost, won = sum(drop > 0 for drop in worse), sum(drop < 0 for drop in worse)
    p_value = None
    method: Method = "student"
    if aggregate is not None:
        method, drop = "bootstrap", _bootstrap(reference, candidate, sign, value, confidence, seed)
        if sum(a != b for a, b in zip(reference, candidate, strict=True)) < FEWEST:
            drop = Interval(drop.estimate, -math.inf, math.inf, confidence)
    elif all(score in (0, 1) for score in (*reference, *candidate)):
        method, drop = "tango", tango_interval(lost, won, documents, confidence)
        p_value = mcnemar(lost, won)
    else:
        drop = _student(worse, confidence)
        if lost + won < FEWEST:
            span = max(*reference, *candidate) - min(*reference, *candidate)
            few = tango_interval(lost, won, documents, confidence)
            low, high = min(drop.low, span * few.low), max(drop.high, span * few.high)
            drop = Interval(drop.estimate, low, high, confidence)
    return Comparison(
        documents=documents,
        reference=value(list(reference)),
        candidate=value(list(candidate)),
        drop=drop,
        lost=lost,
        won=won,
        flips=(lost + won) / documents,
        p_value=p_value,
        method=method,
    )


def documents_needed(comparison: Comparison, max_drop: float) -> int | None:
    """How many documents like these would bring ``drop.high`` down to ``max_drop``.

    If the estimate is the truth, a run of that many passes about every other time. None if the
    estimate is not below ``max_drop``, or if the interval is infinite and says nothing.
    """
    from scipy import stats

    drop, documents = comparison.drop, comparison.documents
    room = max_drop - drop.estimate
    if room <= 0 or math.isclose(max_drop, drop.estimate) or math.isinf(drop.high):
        return None
    z = stats.norm.ppf((1 + drop.confidence) / 2)
    if comparison.method == "tango":
        rates = comparison.lost / documents, comparison.won / documents
        return max(1, math.ceil(z**2 * score_variance(*rates, min(max_drop, 1)) / room**2))
    # The other intervals are about t s / sqrt(n) wide, and t about z + (z³ + z) / 4n.
    spread = (drop.high - drop.estimate) * math.sqrt(documents)
    spread /= stats.t.ppf((1 + drop.confidence) / 2, documents - 1)
    return max(FEWEST, math.ceil((z * spread / room) ** 2 + (z**2 + 1) / 2))


def _student(worse: list[float], confidence: float) -> Interval:
    import numpy as np
    from scipy import stats

    estimate = float(np.mean(worse))
    half = math.inf
    if len(worse) >= FEWEST:
        error = np.std(worse, ddof=1) / math.sqrt(len(worse))
        half = float(stats.t.ppf((1 + confidence) / 2, len(worse) - 1) * error)
    return Interval(estimate, estimate - half, estimate + half, confidence)


def _bootstrap(
    reference: Sequence[Any],
    candidate: Sequence[Any],
    sign: int,
    value: Callable[[list[Any]], float],
    confidence: float,
    seed: int,
) -> Interval:
    import numpy as np

    def drop(rows: np.ndarray) -> float:
        chosen = rows.tolist()
        before, after = (
            value([scores[row] for row in chosen]) for scores in (reference, candidate)
        )
        return sign * (before - after)

    def statistic(rows: np.ndarray, axis: int) -> np.ndarray:
        return np.apply_along_axis(drop, axis, rows)

    rows = np.arange(len(reference))
    return bootstrap_interval(statistic, [rows], confidence=confidence, seed=seed)


def _mean(scores: list[float]) -> float:
    return math.fsum(scores) / len(scores)


def _guarded(aggregate: Callable[[list[Any]], float]) -> Callable[[list[Any]], float]:
    """Infinite where it overflows, as perplexities do, or divides by no words; never a warning."""

    def value(scores: list[Any]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return float(aggregate(scores))
            except ArithmeticError:
                return math.inf

    return value


def _finite(score: Any) -> bool:
    if isinstance(score, (list, tuple)):
        return all(map(_finite, score))
    return isinstance(score, str) or bool(math.isfinite(score))
