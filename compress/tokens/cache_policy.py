"""How much of a prompt's keys and values is kept, by layer and head, and which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from compress.errors import BadInput, did_you_mean

Scorer = Literal["snapkv", "knorm", "random", "recent"]


@dataclass(frozen=True)
class CachePolicy:
    """After a prompt, the share ``budget`` in (0, 1] of its keys and values stays in the cache.

    The share is of the bytes of all layers and heads together. ``shares``: by layer, how its part
    compares to that of others (positive; None: all alike); ``head_groups``: by layer, the numbers
    of the key heads that hold twice as much as the others (None: all alike). Every head of every
    layer keeps the first ``sinks`` tokens of a sequence and its last ``window``, so a prompt of
    few tokens keeps more than its budget, and one of no more than these stays whole.

    ``scorer`` says which of the others stay: "snapkv" (arXiv 2404.14469), those that the last
    ``window`` tokens attend to; "knorm" (arXiv 2406.11430), those with short keys; "recent" (as of
    StreamingLLM, arXiv 2309.17453); "random", drawn by ``seed``.

    Raises `BadInput` for values that cannot be; what a model has is looked up by the engine.
    """

    budget: float
    window: int = 16
    sinks: int = 4
    scorer: Scorer = "snapkv"
    shares: tuple[float, ...] | None = None
    head_groups: tuple[tuple[int, ...], ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.budget) is not float or not 0 < self.budget <= 1:
            raise _wrong("budget", self.budget, "a share in (0, 1], such as 0.25")
        for name, least in (("window", 1), ("sinks", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise _wrong(name, value, f"a whole number, {least} or more")
        if self.scorer not in get_args(Scorer):
            mend = did_you_mean(str(self.scorer), get_args(Scorer))
            raise _wrong("scorer", self.scorer, ", ".join(get_args(Scorer)), mend)
        try:  # lists, as JSON has them, become tuples
            shares = None if self.shares is None else tuple(map(float, self.shares))
            groups = None if self.head_groups is None else tuple(map(tuple, self.head_groups))
        except (TypeError, ValueError):
            raise BadInput("a list of layers is expected", where=_WHERE) from None
        if shares is not None and not all(0 < share < float("inf") for share in shares):
            raise _wrong("shares", self.shares, "a positive number for each layer")
        numbers = [head for layer in groups or () for head in layer]
        if not all(type(head) is int and head >= 0 for head in numbers):
            raise _wrong("head_groups", self.head_groups, "numbers of heads for each layer")
        object.__setattr__(self, "shares", shares)
        object.__setattr__(self, "head_groups", groups)

    @property
    def least(self) -> int:
        """How many tokens every head keeps of a longer prompt."""
        return self.window + self.sinks

    def to_json(self) -> dict[str, Any]:
        """All settings, of types that JSON knows."""
        listed = {
            "shares": None if self.shares is None else list(self.shares),
            "head_groups": None if self.head_groups is None else list(map(list, self.head_groups)),
        }
        return asdict(self) | listed

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> CachePolicy:
        """The policy of `to_json`. Raises `BadInput` for unknown, missing and wrong settings."""
        known = [setting.name for setting in fields(cls)]
        for name in settings:
            if name not in known:
                raise BadInput(
                    f"unknown setting '{name}'", where=_WHERE, mend=did_you_mean(name, known)
                )
        if "budget" not in settings:
            raise BadInput("'budget' is missing", where=_WHERE)
        return cls(**settings)


_WHERE = "cache policy"


def _wrong(name: str, value: object, expected: str, mend: str | None = None) -> BadInput:
    return BadInput("cannot be", where=f"{_WHERE}, {name}", got=value, expected=expected, mend=mend)
