"""How many tokens each layer and head keeps, so that all of them together fit a budget."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import floor

_DEEPEST = 1 / 20  # PyramidKV's beta
_HALVINGS = 60


def allot(tokens: int, budget: float, shares: Sequence[float], least: int) -> list[int]:
    """Of each layer how many of ``tokens`` it keeps: in proportion to ``shares``, within bounds.

    No layer keeps fewer than ``least`` or more than there are; what the bounds take or leave goes
    to the other layers in proportion. All layers together keep ``budget`` of their tokens rounded
    down, or ``least`` each where that is more, whatever the shares: rivals hold the same bytes.
    """
    least = min(least, tokens)
    total = max(floor(budget * len(shares) * tokens + 1e-9), least * len(shares))

    def at(scale: float) -> list[float]:
        return [min(max(scale * share, least), tokens) for share in shares]

    low, high = 0.0, tokens / min(shares)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) <= total else (low, middle)
    exact = at(low)
    kept = [floor(amount + 1e-9) for amount in exact]
    order = sorted(range(len(kept)), key=lambda layer: kept[layer] - exact[layer])
    open_layers = [layer for layer in order if kept[layer] < tokens]
    for layer in open_layers[: total - sum(kept)]:
        kept[layer] += 1
    return kept


def allot_heads(kept: int, tokens: int, heads: int, high: Sequence[int], least: int) -> list[int]:
    """Of each of a layer's ``heads`` how many of ``tokens`` it keeps, ``kept`` in the mean.

    Those in ``high`` keep twice as many as the others, as in UNComp (arXiv 2410.03090: 768 and 384
    of a nominal 512), rounded down, within bounds as for `allot`.
    """
    many, few = len(high), heads - len(high)
    if not many or not few:
        return [kept] * heads
    low_count = max(kept * heads // (2 * many + few), min(least, tokens))
    high_count = min((kept * heads - low_count * few) // many, tokens)
    low_count = min((kept * heads - high_count * many) // few, tokens)
    return [high_count if head in high else low_count for head in range(heads)]


def pyramid(layers: int) -> list[float]:
    """Shares that fall in a line from the first layer to the last (PyramidKV, arXiv 2406.02069)."""
    top = 2 - _DEEPEST
    return [top - (top - _DEEPEST) * layer / max(layers - 1, 1) for layer in range(layers)]


def staged(stages: Sequence[int]) -> list[float]:
    """By layer the mean of `pyramid` over the layers of its stage (UNComp)."""
    line = iter(pyramid(len(stages)))
    shares: list[float] = []
    for _, stage in groupby(stages):
        part = [next(line) for _ in stage]
        shares += [sum(part) / len(part)] * len(part)
    return shares
