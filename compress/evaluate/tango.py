"""Paired 0/1 outcomes: McNemar's exact test and Tango's score interval."""

from __future__ import annotations

import math

from compress.errors import BadInput
from compress.evaluate.bootstrap import Interval


def mcnemar(lost: int, won: int) -> float:
    """The p-value of McNemar's exact two-sided test: losses and wins are equally likely."""
    from scipy import stats

    return float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def tango_interval(lost: int, won: int, documents: int, confidence: float = 0.95) -> Interval:
    """The score interval of the paired difference (lost - won) / documents.

    Tango 1998, Statistics in Medicine 17:891: the differences d that a score test does not reject,
    |estimate - d| <= z sqrt(V(d) / documents), V(d) being the variance of one document's change
    under the likeliest rates that differ by d. Unlike Wald's interval it keeps its coverage for few
    documents and few changes: without any its ends are ± z² / (documents + z²). Raises `BadInput`
    for counts that cannot be.
    """
    from scipy import stats

    if documents < 1 or min(lost, won) < 0 or lost + won > documents:
        raise BadInput(
            "impossible counts of documents",
            got=f"{lost} lost and {won} won of {documents}",
            expected="lost + won <= documents",
        )
    z = float(stats.norm.ppf((1 + confidence) / 2))
    return Interval(
        (lost - won) / documents,
        -_upper_end(won, lost, documents, z),
        _upper_end(lost, won, documents, z),
        confidence,
    )


def _upper_end(lost: int, won: int, documents: int, z: float) -> float:
    from scipy import optimize

    if lost == documents:
        return 1.0
    # Where all documents agree the estimate is a root as well, since it leaves no variance.
    if lost + won == 0:
        return z**2 / (documents + z**2)
    if won == documents:
        return (z**2 - documents) / (z**2 + documents)
    estimate = (lost - won) / documents
    rates = lost / documents, won / documents

    def excess(difference: float) -> float:
        return difference - estimate - z * math.sqrt(score_variance(*rates, difference) / documents)

    return float(optimize.brentq(excess, estimate, 1, xtol=1e-15))


def score_variance(lost: float, won: float, difference: float) -> float:
    """Of one document's change, were ``difference`` the true one; ``lost``, ``won``: shares.

    With q the likeliest true share of wins, 2 q² + b q + c = 0 (the larger root), losses have
    q + difference and the variance is 2 q + difference (1 - difference).
    """
    if difference < 0:  # c must not be positive, or rounding could leave no real root
        return score_variance(won, lost, -difference)
    b = difference * (2 - lost + won) - lost - won
    c = -won * difference * (1 - difference)
    root = math.sqrt(b**2 - 8 * c)
    share = (root - b) / 4 if b < 0 else -2 * c / (root + b) if c else 0.0  # without cancellation
    return max(0.0, 2 * share + difference * (1 - difference))
