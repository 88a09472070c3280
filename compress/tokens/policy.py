"""What is to be pruned, where and by whom: the settings of one engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from compress.errors import BadInput, did_you_mean

Target = Literal["visual", "text"]


@dataclass(frozen=True)
class TokenPolicy:
    """Tokens leave the sequence before decoder layer ``layer``, 1 or more, and stay away.

    ``keep``: of each segment, a share (a float in (0, 1], rounded up) or a number of tokens (an
    int); at least one token stays. ``selector`` with its ``options`` says which. A segment is a run
    of adjoining visual tokens; with ``target`` "text", what a prompt holds between its first
    ``sinks`` and its last ``recent`` tokens. ``seed`` is for selectors that draw.

    Raises `BadInput` for values that cannot be; the selector is looked up by the engine.
    """

    layer: int
    keep: float
    selector: str
    target: Target = "visual"
    seed: int = 0
    sinks: int = 4
    recent: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("layer", 1), ("seed", 0), ("sinks", 0), ("recent", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise _wrong(name, value, f"a whole number, {least} or more", _MEND.get(name))
        number = type(self.keep) is int and self.keep >= 1
        share = type(self.keep) is float and 0 < self.keep <= 1
        if not number and not share:
            raise _wrong("keep", self.keep, "a share in (0, 1], or a number of tokens (1, 2, ...)")
        if self.target not in get_args(Target):
            mend = did_you_mean(str(self.target), get_args(Target))
            raise _wrong("target", self.target, " or ".join(get_args(Target)), mend)
        if not isinstance(self.selector, str):
            raise _wrong("selector", self.selector, "the name of a selector")
        if not isinstance(self.options, Mapping):
            raise _wrong("options", self.options, "the selector's options by name")

    def count(self, tokens: int) -> int:
        """How many of a segment's ``tokens`` stay."""
        if type(self.keep) is int:
            return min(self.keep, tokens)
        # The product of a share and a number that are both exact may lie just above a whole number.
        return max(1, math.ceil(self.keep * tokens - 1e-9))

    def to_json(self) -> dict[str, Any]:
        """All settings, of types that JSON knows. 1 (one token) is not 1.0 (all of them)."""
        return asdict(self) | {"options": dict(self.options)}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> TokenPolicy:
        """The policy of `to_json`. Raises `BadInput` for unknown, missing and wrong settings."""
        known = [setting.name for setting in fields(cls)]
        for name in settings:
            if name not in known:
                raise BadInput(
                    f"unknown setting '{name}'", where=_WHERE, mend=did_you_mean(name, known)
                )
        for name in ("layer", "keep", "selector"):
            if name not in settings:
                raise BadInput(f"'{name}' is missing", where=_WHERE)
        return cls(**settings)


_WHERE = "token policy"
_MEND = {"layer": "before layer 0 nothing can go: caches take their length from it"}


def _wrong(name: str, value: object, expected: str, mend: str | None = None) -> BadInput:
    return BadInput("cannot be", where=f"{_WHERE}, {name}", got=value, expected=expected, mend=mend)
