"""Values of a document that somebody else wrote, taken for what they should be or left out."""

from __future__ import annotations

from typing import Any


def text(value: Any, most: int = 1000) -> str:
    """Text on one line, at most so long; empty for what is neither text nor a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    line = " ".join(str(value).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def number(value: Any) -> float | None:
    """A number that is finite and not absurd; an integer stays one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -1e300 < value < 1e300 else None


def count(value: Any) -> int | None:
    """An integer that can count or name something."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def members(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[dict[str, Any]]:
    """The objects of a list."""
    return [entry for entry in items(value) if isinstance(entry, dict)]


def counts(value: Any) -> list[int]:
    """The integers of a list that can count or name something."""
    return [found for entry in items(value) if (found := count(entry)) is not None]


def numbers(value: Any) -> list[float]:
    """The numbers of a list."""
    return [found for entry in items(value) if (found := number(entry)) is not None]
