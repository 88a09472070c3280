"""Sublayers as the calibration pass wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from compress.prune.sublayers import Sublayers
from compress.signals import Part


def sublayer_parts(
    model: Any, sublayers: Sequence[Sublayers], part: Literal["attention", "mlp"]
) -> list[Part]:
    """For `collect`, the attention or the MLP of every block, from `find_sublayers` of a model.

    An MLP is scored on what it reads: the stream with the attention's share where that comes first.
    """
    module = model.get_submodule
    if part == "attention":
        return [Part(module(block.attention.last)) for block in sublayers]
    return [
        Part(
            module(block.mlp.last),
            module(block.attention.last) if block.topology == "sequential" else None,
        )
        for block in sublayers
    ]
