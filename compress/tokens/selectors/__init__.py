"""Which tokens of a segment to keep: the selectors that a policy can name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, did_you_mean
from compress.tokens.selectors.divprune import DivPrune
from compress.tokens.selectors.energy import Energy
from compress.tokens.selectors.fastv import FastV
from compress.tokens.selectors.logdet import LogDet
from compress.tokens.selectors.random_draw import RandomDraw
from compress.tokens.selectors.released import Released
from compress.tokens.selectors.renyi2 import Renyi2
from compress.tokens.selectors.uniform import Uniform
from compress.tokens.selectors.visionzip import VisionZip
from compress.tokens.selectors.von_neumann import VonNeumann

if TYPE_CHECKING:
    from compress.tokens.segment import Selector

# Each is a frozen dataclass whose fields are its options and whose instances are selectors.
SELECTORS: dict[str, type[Any]] = {
    "divprune": DivPrune,
    "energy": Energy,
    "fastv": FastV,
    "logdet": LogDet,
    "random": RandomDraw,
    "released": Released,
    "renyi2": Renyi2,
    "uniform": Uniform,
    "visionzip": VisionZip,
    "von_neumann": VonNeumann,
}


def make_selector(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """The selector of that name, one of `SELECTORS`, with these options.

    Every selector takes a segment of any dtype, raises `BadInput` where it is to keep none or more
    than there are or finds values that are not finite, and gives the same answer every time.
    Raises `BadInput` for a name or an option that there is not, and for a value of the wrong type
    or out of range.
    """
    if name not in SELECTORS:
        raise BadInput(f"unknown selector '{name}'", mend=did_you_mean(name, SELECTORS))
    known = {field.name: type(field.default) for field in fields(SELECTORS[name])}
    for option, value in (options or {}).items():
        if option not in known:
            raise BadInput(
                f"selector '{name}' has no option '{option}'", mend=did_you_mean(option, known)
            )
        kind = known[option]
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise BadInput(
                "wrong type",
                where=f"selector '{name}', {option}",
                got=value,
                expected=kind.__name__,
            )
    selector: Selector = SELECTORS[name](**(options or {}))
    return selector
