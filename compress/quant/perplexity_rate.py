"""The least rate of entropy-coded weights at which a model's perplexity stays within bounds.

How a loss grows as bits are taken away differs from model to model; so the rate is bisected, and
every trial is a measurement of the quantized model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.quant.allocation import GRID
from compress.quant.ecsq import quantize_ecsq
from compress.quant.fitting import Allocation, fit_rate
from compress.quant.quantized_perplexity import QuantizedPerplexity
from compress.quant.trial_journal import Trial, TrialJournal, digest

if TYPE_CHECKING:
    import torch

TOLERANCE = 0.05  # bits per weight
# Tried before anything is bisected, from the start up or down; four halvings between two suffice.
_RUNGS = (1.75, 2.5, 3.25, 4.0, 4.75, 5.5, 6.25)
_START = 4.0
_FINEST = math.inf  # the target for which the steps are the narrowest


@dataclass(frozen=True)
class RateFound:
    """The allocation that was asked for, its ``ratio``, and all trials in their order."""

    allocation: Allocation
    ratio: float
    trials: tuple[Trial, ...]


def rate_for_perplexity(
    model: Any,
    read: Callable[[str], torch.Tensor],
    names: Collection[str],
    max_ratio: float,
    tokens: torch.Tensor,
    scale_dtype: torch.dtype,
    *,
    sensitivities: Mapping[str, float] | None = None,
    fine: Collection[str] = (),
    rows: Mapping[str, torch.Tensor] | None = None,
    rdo: float = 0.0,
    seed: int = 0,
    activations: int | None = None,
    journal: Path | None = None,
    subject: str = "",
    progress: Progress = SILENT,
) -> RateFound:
    """The least rate, to `TOLERANCE`, that multiplies the perplexity by at most ``max_ratio``.

    What is found is the least that the format takes, or at most `TOLERANCE` above a rate that is
    too low. See `QuantizedPerplexity` for ``model``, ``read``, ``names``, ``tokens`` and memory.
    The model has its weights again afterwards, whatever happens. A trial is `fit_rate`, which see
    for ``scale_dtype``, ``sensitivities``, ``fine``, ``rows``, ``rdo`` and ``seed``; the model
    computes with the weights as they are in the dtype that was read and, with ``activations``,
    their layers' inputs in so many bits, by token. A model that computes NaN has an infinite ratio.

    ``journal``: a JSON file, rewritten after each trial, by which an interrupted search goes on to
    the same result. ``subject`` names the model, so that no journal of another is taken up.

    Raises `BadInput` for a ``max_ratio`` that is not finite and above 1 or that even 8 bits exceed,
    for a model that computes NaN as it is, the journal of another search, and as `fit_rate` and
    `QuantizedPerplexity`; `Corrupt` for a journal that is none.
    """
    if not 1 < max_ratio < math.inf:
        raise BadInput(
            "must be a finite number above 1", where="max_perplexity_ratio", got=max_ratio
        )
    perplexity = QuantizedPerplexity(model, read, names, tokens, progress)
    arguments = digest(
        tokens,
        names=list(names),
        scale_dtype=str(scale_dtype),
        sensitivities=sensitivities and dict(sensitivities),
        fine=sorted(fine),
        rdo=rdo,
        seed=seed,
        activations=activations,
    )
    trials = TrialJournal(journal, subject, arguments)
    coarsest = _coarsest(read, names, scale_dtype, fine, rdo, progress)
    least = coarsest.total.bits_per_weight

    @cache
    def allocation(target: float) -> Allocation:
        if target <= least:
            return coarsest
        try:
            return fit_rate(
                read,
                names,
                target,
                scale_dtype,
                sensitivities=sensitivities,
                fine=fine,
                rows=rows,
                rdo=rdo,
                seed=seed,
                progress=progress,
            )
        except BadInput:
            if target == _FINEST:
                raise
            # Curves can be wrong by a bit: the codec takes none for a matrix that is all zeros.
            return coarsest

    def measure(target: float) -> Trial:
        found = allocation(target)

        def dense(name: str) -> torch.Tensor:
            w, own = read(name), (rows or {}).get(name)
            q = quantize_ecsq(w, found.c[name], scale_dtype, rdo=rdo, rows=own, name=name)
            return q.dense(w.dtype)

        bits = found.total.bits_per_weight
        ratio = perplexity.ratio(dense, activations, f"perplexity at {bits:.3f} bits")
        progress.note(f"{bits:.3f} bits per weight: {ratio:.4f} times the perplexity")
        return Trial(bits, ratio)

    with perplexity.restored():
        best, tried = _search(lambda target: trials.of(target, measure), least, max_ratio)
    return RateFound(allocation(best), tried[best].ratio, tuple(tried.values()))


def _coarsest(
    read: Callable[[str], torch.Tensor],
    names: Collection[str],
    scale_dtype: torch.dtype,
    fine: Collection[str],
    rdo: float,
    progress: Progress,
) -> Allocation:
    """The widest steps there are, counted."""
    c = {name: 0.0 if name in fine else GRID[-1] for name in names}
    rates = {}
    with progress.step("counting the least bits", len(c), "matrices") as step:
        for name, value in c.items():
            quantized = quantize_ecsq(read(name), value, scale_dtype, rdo=rdo, name=name)
            rates[name] = quantized.rate()
            step.advance(1)
    return Allocation(c, rates)


def _search(
    measure: Callable[[float], Trial], least: float, max_ratio: float
) -> tuple[float, dict[float, Trial]]:
    """The target whose trial is the answer, and all that were tried, in their order."""
    tried: dict[float, Trial] = {}

    def allowed(target: float) -> bool:
        if target not in tried:
            tried[target] = measure(target)
        return tried[target].ratio <= max_ratio

    rungs = [least, *(rung for rung in _RUNGS if rung > least), _FINEST]
    at = rungs.index(_START) if _START in rungs else 0
    while at and allowed(rungs[at]):
        at -= 1
    while not allowed(rungs[at]):
        if rungs[at] == _FINEST:
            raise BadInput(
                "even 8 bits do not keep the perplexity so low",
                where="max_perplexity_ratio",
                got=max_ratio,
                expected=f"more than the {tried[_FINEST].ratio:.6g} that they reach",
                mend="leave layers out",
            )
        at += 1
    best, low = rungs[at], rungs[max(0, at - 1)]
    high = tried[best].bits_per_weight
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        if allowed(middle):
            best, high = middle, tried[middle].bits_per_weight
        else:
            low = middle
    return best, tried
