"""Confidence intervals for any statistic of whole documents, by resampling the documents."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["passed", "failed", "undecided"]

FEWEST = 10  # documents; the spread of fewer says next to nothing about the spread of all
_CELLS = 1 << 20  # resampled values that exist at a time
_JACKKNIFED = 2000  # documents; the cost of BCa grows with their square, its effect shrinks


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided confidence interval, low <= estimate <= high.

    The ends are infinite where the documents are too few to say anything.
    """

    estimate: float
    low: float
    high: float
    confidence: float

    def verdict(self, limit: float) -> Verdict:
        """Whether the true value is at most ``limit``.

        "passed" when the whole interval says so, "failed" when the estimate itself is above it,
        else "undecided": more documents would tell. What is exactly at the limit passes with a
        probability of (1 - confidence) / 2.
        """
        if self.high <= limit:
            return "passed"
        return "failed" if self.estimate > limit else "undecided"


def bootstrap_interval(
    statistic: Callable[..., Any],
    columns: Sequence[np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The BCa bootstrap interval (Efron 1987) of ``statistic`` over documents.

    ``columns``: arrays [documents] that are resampled together, one row a document;
    ``statistic(*columns, axis=...)`` reduces arrays [..., documents] to floats along ``axis``. The
    quantiles are Student's instead of the normal distribution's (the expanded percentiles of
    Hesterberg, arXiv 1411.5279), without which intervals from few documents are too narrow; from
    fewer than `FEWEST` the interval is infinite, as it is if a resample's statistic is not finite.
    Where BCa is undefined or would take too long the percentiles stand uncorrected; where all
    resamples agree the interval is a point. Raises `BadInput` for no documents, columns of
    different lengths, and values or an estimate that are not finite.
    """
    import numpy as np

    documents = _check(columns)
    estimate = float(statistic(*columns, axis=-1))
    if not math.isfinite(estimate):
        raise BadInput("a statistic of the documents is not finite", got=estimate)
    if documents < FEWEST:
        return Interval(estimate, -math.inf, math.inf, confidence)
    low, high = _ends(statistic, columns, confidence, resamples, seed)
    if not (np.isfinite(low) and np.isfinite(high)):
        return Interval(estimate, -math.inf, math.inf, confidence)
    return Interval(estimate, min(low, estimate), max(high, estimate), confidence)


def _ends(
    statistic: Callable[..., Any],
    columns: Sequence[np.ndarray],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    import numpy as np
    from scipy import stats

    documents = len(columns[0])
    quantile = stats.t.ppf((1 + confidence) / 2, documents - 1)
    expanded = 1 - 2 * stats.norm.sf(quantile * math.sqrt(documents / (documents - 1)))

    def interval(method: str, resamples: int, earlier: Any) -> Any:
        return stats.bootstrap(
            columns,
            statistic,
            n_resamples=resamples,
            batch=max(1, _CELLS // documents),
            vectorized=True,
            paired=True,
            confidence_level=expanded,
            method=method,
            bootstrap_result=earlier,
            rng=np.random.default_rng(seed),
        )

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of degenerate data, which the next lines deal with
        result = interval("BCa" if documents <= _JACKKNIFED else "percentile", resamples, None)
        if not np.isfinite(result.confidence_interval).all():
            result = interval("percentile", 0, result)
    low, high = result.confidence_interval
    return float(low), float(high)


def _check(columns: Sequence[np.ndarray]) -> int:
    """The number of documents."""
    import numpy as np

    lengths = sorted({len(column) for column in columns})
    if len(lengths) > 1:
        raise BadInput("columns differ in their number of documents", got=lengths)
    if not lengths or not lengths[0]:
        raise BadInput("there are no documents")
    for column in columns:
        finite = np.isfinite(column)
        if not finite.all():
            document = int(np.flatnonzero(~finite)[0])
            raise BadInput(
                "a value is not finite", where=f"document {document}", got=column[document]
            )
    return lengths[0]
