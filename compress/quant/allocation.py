"""One rate for all matrices together: which step each gets.

At high rates an entropy-coded matrix of n weights with step d has the distortion n s d^2 / 12, s
being what an error of its weights does (`measure_fisher`), and a rate that falls by one bit a
weight when d doubles. No exchange of bits improves on equal slopes in all matrices (Shoham and
Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans. ASSP 36(9),
1988), which means d proportional to 1 / sqrt(s). Without sensitivities every matrix gets the same
step relative to its spread, or what `search_levels` has found.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.quant.ecsq import quantize_rows, row_extent
from compress.quant.qtensor import check_matrix, side_by_side
from compress.quant.rate import count_codes

if TYPE_CHECKING:
    import torch

# c of the points of a curve: from where all codes are those of 8-bit rounding to almost all are 0.
# Closer where Huffman's excess over the entropy rises and falls.
GRID = tuple(
    2.0**log2
    for log2 in (-6, -5, -4, -3, -2.5, -2, *(quarter / 4 for quarter in range(-6, 5)), 1.5, 2)
)
_OCTAVES = tuple(map(math.log2, GRID))
_SAMPLE, _SAMPLE_ROWS = 1 << 15, 32  # weights and rows, whichever is more
_FRAMING = 0.007  # bits a weight for the codec's tables and checksums, and for chance


@dataclass(frozen=True)
class Curve:
    """What a matrix costs: ``bits`` per weight, scales counted, at each c of `GRID`.

    ``spread``: root mean square over the rows of their standard deviations.
    """

    weights: int
    spread: float
    bits: tuple[float, ...]

    @classmethod
    def flat(cls, weights: int, bits: float) -> Curve:
        """That of a matrix that takes ``bits`` per weight whatever the others do."""
        return cls(weights, 0.0, (bits,) * len(GRID))

    def at(self, c: float) -> float:
        """Bits per weight, between the points linear in log c."""
        octave = min(max(math.log2(c), _OCTAVES[0]), _OCTAVES[-1])
        right = max(1, bisect_left(_OCTAVES, octave))
        (x, y), (bits, more) = _OCTAVES[right - 1 : right + 1], self.bits[right - 1 : right + 1]
        return bits + (more - bits) * (octave - x) / (y - x)


def measure_curve(
    w: torch.Tensor,
    scale_dtype: torch.dtype,
    *,
    rdo: float = 0.0,
    rows: torch.Tensor | None = None,
    seed: int = 0,
    name: str = "",
) -> Curve:
    """The curve of a matrix [rows, columns], from some of its rows that ``seed`` and name choose.

    ``rows`` as for `quantize_ecsq`, and raises as that.
    """
    check_matrix(w, name)
    count = min(len(w), max(_SAMPLE_ROWS, _SAMPLE // w.shape[1]))
    drawn = sorted(random.Random(f"{seed} {name}").sample(range(len(w)), count))
    sample = w[drawn].detach()
    spread, peak = row_extent(sample, name)
    widths = spread if rows is None else spread * rows[drawn]

    def bits(c: float) -> float:
        quantized = quantize_rows(sample, widths, peak, c, scale_dtype, rdo, name)
        scales = quantized.scale.element_size() * 8 / w.shape[1]
        return _huffman_bits(count_codes(quantized.codes)) / sample.numel() + scales + _FRAMING

    falling = accumulate(side_by_side(bits, GRID), min)
    return Curve(w.numel(), float(spread.square().mean().sqrt()), tuple(falling))


def allocate(
    curves: Mapping[str, Curve],
    target: float,
    sensitivities: Mapping[str, float] | None = None,
    *,
    factors: Mapping[str, float] | None = None,
    dropped: Collection[str] = (),
) -> dict[str, float]:
    """The c of each matrix, within `GRID`, for at most ``target`` bits per weight of all together.

    ``sensitivities``: by name what an error of a weight costs (`measure_fisher`, its mean); or
    ``factors``: by name how wide a matrix's steps are beside those of the others, relative to its
    spread, 1 for one that is not named; without either all get one c. ``dropped``: matrices that
    become zeros and have no c. They take no bits, but their weights are among those that the target
    is for, so that the others share what they leave.

    Raises `BadInput` for a target below what the widest steps cost, which it names, and for a
    sensitivity or factor that is none; `ValueError` for both.
    """
    if factors is not None and sensitivities is not None:
        raise ValueError("steps go by sensitivities or by factors, not by both")
    kept = {name: curve for name, curve in curves.items() if name not in dropped}
    if factors is None:
        factors = relative_steps(kept, sensitivities)
    else:
        factors = {name: _factor(name, factors.get(name, 1.0)) for name in kept}
    weights = sum(curve.weights for curve in curves.values())

    def steps(k: float) -> dict[str, float]:
        return {name: min(GRID[-1], max(GRID[0], k * f)) for name, f in factors.items()}

    def rate(k: float) -> float:
        return sum(kept[name].at(c) * kept[name].weights for name, c in steps(k).items()) / weights

    finite = [factor for factor in factors.values() if factor < math.inf] or [1.0]
    fine, coarse = GRID[0] / max(finite), GRID[-1] / min(finite)
    if rate(coarse) > target:
        raise BadInput(
            "so few bits per weight cannot be reached",
            where="bits_per_weight",
            got=target,
            expected=f"{math.ceil(rate(coarse) * 1000) / 1000} or more",
        )
    if rate(fine) <= target:
        return steps(fine)
    while coarse / fine > 1 + 1e-6:
        middle = math.sqrt(fine * coarse)
        fine, coarse = (middle, coarse) if rate(middle) > target else (fine, middle)
    return steps(coarse)


def relative_steps(
    curves: Mapping[str, Curve], sensitivities: Mapping[str, float] | None
) -> dict[str, float]:
    """How wide each matrix's steps are beside those of the others, relative to its spread.

    Infinite where an error does no harm. Raises `BadInput` for a sensitivity that is none.
    """
    if sensitivities is None:
        return dict.fromkeys(curves, 1.0)
    factors = {}
    for name, curve in curves.items():
        sensitivity = sensitivities.get(name, math.nan)
        if not 0 <= sensitivity < math.inf:
            raise BadInput("no sensitivity that is a number", where=name, got=sensitivity)
        weight = math.sqrt(sensitivity) * curve.spread
        factors[name] = 1 / weight if weight else math.inf
    return factors


def _factor(name: str, factor: float) -> float:
    if not 0 < factor < math.inf:
        raise BadInput("no factor of a step", where=name, got=factor, expected="above 0")
    return factor


def _huffman_bits(counts: torch.Tensor) -> int:
    """Bits of symbols that occur so often in one Huffman code without limit; 0 for one symbol.

    Each merge of two subtrees puts a bit before all their symbols. The codec's limit of 12 bits
    concerns symbols too rare to matter here.
    """
    heap = [count for count in counts.tolist() if count]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heap[0]
        heapq.heapreplace(heap, both)
        bits += both
    return bits
