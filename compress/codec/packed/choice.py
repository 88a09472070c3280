"""Which layout a GPU should get."""

from __future__ import annotations

_LANES = 128  # of a multiprocessor: instructions it issues in a cycle
_DENSE_BYTES = 10.76 / 8  # a weight
_DENSE_INSTRUCTIONS = 24  # a weight: table lookup, shifts, refill, and its part in the product


def choose(bandwidth_gbs: float, clock_mhz: float, multiprocessors: int) -> str:
    """``dense`` where the processor can decode it as fast as memory brings it, else ``fast``.

    ``bandwidth_gbs``: of the GPU's memory, in 10^9 bytes a second; ``clock_mhz``: of its
    multiprocessors. The rule divides the lane instructions of a second by the weights that memory
    would bring in it. Cards with GDDR have 40 to 70 for each weight, those with HBM 5 to 15.
    """
    instructions = _LANES * multiprocessors * clock_mhz * 1e6
    weights = bandwidth_gbs * 1e9 / _DENSE_BYTES
    return "dense" if instructions > _DENSE_INSTRUCTIONS * weights else "fast"
