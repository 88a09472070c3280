"""How the library reports progress without printing: it calls, somebody else draws.

The command line passes an implementation that draws bars on a terminal; by default nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Step(Protocol):
    """One running piece of work."""

    def advance(self, amount: int) -> None:
        """``amount`` more units (bytes unless the step says otherwise) are done."""


class Progress(Protocol):
    """Receives the pieces of work as they begin, advance and end."""

    def step(self, label: str, total: int, unit: str = "B") -> AbstractContextManager[Step]:
        """A context manager that gives a `Step`; ``total`` is in ``unit``."""

    def note(self, line: str) -> None:
        """A remark worth one line: a fallback taken, a shard resumed."""


class Silent:
    """The default: says nothing."""

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Step]:
        yield self

    def advance(self, amount: int) -> None:
        pass

    def note(self, line: str) -> None:
        pass


SILENT = Silent()


@contextmanager
def no_bars() -> Iterator[None]:
    """Libraries that draw tqdm's bars draw none; we report in our own way."""
    from tqdm.std import tqdm

    draw = tqdm.__init__

    # tqdm reads its environment variable only once, when it is imported.
    def draw_nothing(bar: Any, *args: Any, **options: Any) -> None:
        draw(bar, *args, **{**options, "disable": True})

    tqdm.__init__ = draw_nothing
    try:
        yield
    finally:
        tqdm.__init__ = draw
