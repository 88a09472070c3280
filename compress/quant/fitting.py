"""From a rate to steps whose codes take no more than it, counted and not estimated."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.quant.allocation import Curve, allocate, measure_curve
from compress.quant.ecsq import quantize_ecsq
from compress.quant.rate import Rate

if TYPE_CHECKING:
    import torch

_SLACK = 0.01  # bits a weight below the target that are not worth another reading
_MARGIN = 0.001  # bits a weight that a curve may err near where it was counted; doubled each time
_ROUNDS = 6


@dataclass(frozen=True)
class Allocation:
    """``c`` by name, 0 for a matrix kept fine; ``rates``: what each costs with it, exactly.

    Of a matrix that is dropped the c is infinite, and the rate 0 bits.
    """

    c: Mapping[str, float]
    rates: Mapping[str, Rate]

    @property
    def total(self) -> Rate:
        return sum(self.rates.values(), Rate())


def fit_rate(
    read: Callable[[str], torch.Tensor],
    names: Collection[str],
    target: float,
    scale_dtype: torch.dtype,
    *,
    sensitivities: Mapping[str, float] | None = None,
    factors: Mapping[str, float] | None = None,
    dropped: Collection[str] = (),
    fine: Collection[str] = (),
    rows: Mapping[str, torch.Tensor] | None = None,
    rdo: float = 0.0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Allocation:
    """The c of each matrix for `quantize_ecsq`: all together take at most ``target`` bits a weight.

    ``read`` gives a matrix [rows, columns] by name. One at a time is held, and each is read twice
    as a rule: for its curve, and to count what it takes. Where that adds up to more than the
    target, or to over 0.01 less, the curves are put right by it and all is counted again.
    ``fine``: those of ``names`` that are kept at 8 bits; they count. ``dropped``: those that become
    zeros, fine or not; their weights count, their bits are none. ``sensitivities`` and ``factors``
    as for `allocate`, ``rows`` by name as for `quantize_ecsq`. Raises as these.
    """
    rows = rows or {}

    def count(c: Mapping[str, float]) -> dict[str, Rate]:
        rates = {}
        with progress.step("counting bits", len(c), "matrices") as step:
            for name, value in c.items():
                quantized = quantize_ecsq(
                    read(name), value, scale_dtype, rdo=rdo, rows=rows.get(name), name=name
                )
                rates[name] = quantized.rate()
                step.advance(1)
        return rates

    gone = {name: Rate(read(name).numel()) for name in names if name in dropped}
    kept = gone | count({name: 0.0 for name in names if name in fine and name not in gone})
    curves = {name: Curve.flat(rate.weights, rate.bits_per_weight) for name, rate in kept.items()}
    if sensitivities is not None:
        sensitivities = {**sensitivities, **dict.fromkeys(kept, 0.0)}
    free = [name for name in names if name not in kept]
    with progress.step("measuring rates", len(free), "matrices") as step:
        for name in free:
            curves[name] = measure_curve(
                read(name), scale_dtype, rdo=rdo, rows=rows.get(name), seed=seed, name=name
            )
            step.advance(1)
    best: Allocation | None = None
    previous: dict[str, float] = {}
    for turn in range(_ROUNDS):
        try:
            c = allocate(curves, target, sensitivities, factors=factors, dropped=gone)
        except BadInput:
            if best is None:
                raise
            break  # what the curves were put right by is too much for the coarsest steps
        if c == previous:
            break
        previous = c
        rates = kept | count({name: c[name] for name in free})
        fixed = {name: math.inf if name in gone else 0.0 for name in kept}
        found = Allocation({name: (c | fixed)[name] for name in names}, rates)
        rate = found.total.bits_per_weight
        if rate <= target:
            if best is None or rate > best.total.bits_per_weight:
                best = found
            if rate > target - _SLACK:
                break
        for name in free:
            error = rates[name].bits_per_weight - curves[name].at(c[name])
            shift = error + _MARGIN * 2**turn
            bits = tuple(point + shift for point in curves[name].bits)
            curves[name] = replace(curves[name], bits=bits)
    if best is None:
        raise BadInput("so few bits per weight cannot be reached", got=target)
    return best
