"""The exceptions users meet. Each prints as one line and carries the process exit code.

A message says what is wrong, where, what was got and expected, and how to mend it; parts that are
unknown are left out. Anything else that escapes the library is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EntropressError(Exception):
    """Base of all errors meant for users. ``exit_code`` is stable across releases."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        mend: str | None = None,
    ) -> None:
        parts = [what if where is None else f"{where}: {what}"]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        line = ", ".join(parts)
        if mend:
            line += f"; {mend}"
        super().__init__(" ".join(line.split()))


class BadInput(EntropressError):
    """The user asked for something that cannot be: a wrong path, recipe, model or option."""


class Corrupt(EntropressError):
    """Stored bytes are not what was written: truncated, flipped, inconsistent or hostile."""

    exit_code = 1


class CheckFailed(EntropressError):
    """A verification or a gate ran to its end and the answer is no."""

    exit_code = 1


class Missing(EntropressError):
    """The environment lacks a package, a tool, a network or room on disk; ``mend`` helps."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint naming the nearest known word, or the whole set when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}" if known else None
