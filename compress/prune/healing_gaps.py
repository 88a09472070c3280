"""Where a stream lacks what removed units gave, and which block can make up for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from compress.errors import BadInput
from compress.prune.fitness import BLOCK, Unit


class Unhealable(BadInput):
    """The model is not one that a linear fold is made for."""


_HALVES = {BLOCK: (0, 1), "attention": (0,), "mlp": (1,)}  # of a block, in the stream's order


@dataclass(frozen=True)
class Gap:
    """Removed units that follow one another in the stream.

    ``before``: the block with the last attention or MLP that is left before them; ``last``: the
    block of the last of them; ``middle``: that is its attention, and its MLP is left.
    """

    before: int
    last: int
    middle: bool


def find_gaps(removed: Collection[Unit]) -> list[Gap]:
    """The gaps in order; one that begins the stream, with nothing before it to heal, is no gap.

    Raises `BadInput` where a whole block is in such a one.
    """
    gone = {2 * index + half for kind, index in removed for half in _HALVES[kind]}
    firsts = sorted(place for place in gone if place - 1 not in gone)
    lasts = sorted(place for place in gone if place + 1 not in gone)
    if firsts[:1] == [0]:
        _check_beginning(removed, lasts[0] // 2)
        del firsts[0], lasts[0]
    return [
        Gap((first - 1) // 2, last // 2, last % 2 == 0)
        for first, last in zip(firsts, lasts, strict=True)
    ]


def _check_beginning(removed: Collection[Unit], last: int) -> None:
    for kind, index in sorted(removed):
        if kind == BLOCK and index <= last:
            raise Unhealable(
                f"block {index} cannot be healed: nothing is left before it",
                got="all up to it removed",
                mend="prune without healing",
            )
