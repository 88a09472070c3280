"""How the command line shows progress, tables and errors. Nothing here is used by the library."""

from __future__ import annotations

import errno
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from compress.errors import EntropressError, Missing
from compress.progress import Progress, Step

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

INTERNAL_ERROR = 70  # EX_SOFTWARE
INTERRUPTED = 130  # 128 + SIGINT


class Cli(click.Group):
    """A group whose commands end in one line and an exit code, whatever goes wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            line, code = _last_words(error, ctx)
            if ctx.meta.get("verbose"):
                click.echo(traceback.format_exc(), err=True, nl=False)
        click.echo(line, err=True)
        raise click.exceptions.Exit(code)


def _last_words(error: BaseException, ctx: click.Context) -> tuple[str, int]:
    """The line a command ends with, and its exit code."""
    if isinstance(error, EntropressError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"error: no room on disk: {error}", Missing.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ctx.meta.get("interrupted", "interrupted"), INTERRUPTED
    line = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
    hint = "" if ctx.meta.get("verbose") else "; run again with -v to see where"
    return line + hint, INTERNAL_ERROR


class Console:
    """Where a command's words go: text to stdout, or JSON there and text to stderr."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json

    def say(self, text: str = "") -> None:
        click.echo(text, err=self._json)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Columns as wide as they need; the first one left-aligned, the others right."""
        lines = [list(header), *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            self.say("  ".join(cells).rstrip())

    def document(self, document: Any) -> None:
        """The one JSON document of a command; nothing without ``--json``.

        NaN and infinities, which JSON does not have, become null.
        """
        if self._json:
            plain = json.loads(json.dumps(document, default=str), parse_constant=lambda _: None)
            click.echo(json.dumps(plain, indent=2, ensure_ascii=False))


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on a terminal, one line a finished step elsewhere; always on stderr.

    Says so when the codec has to do without its native library: all who show progress use it.
    """
    from compress import codec

    backend = codec.backend()
    if not backend.startswith("native"):
        click.echo(f"codec: {backend}", err=True)
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = RichConsole(stderr=True)
    label, amount = TextColumn("{task.description}"), TextColumn("{task.fields[amount]}")
    wide = (label, BarColumn(), amount, TimeRemainingColumn())
    with Bars(*(wide if console.width >= 80 else (label, amount)), console=console) as bars:
        yield Terminal(bars)


class Lines:
    """Progress for logs."""

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Step]:
        start = time.monotonic()
        yield self
        seconds = time.monotonic() - start
        click.echo(f"{label}: {amount_of(total, unit)} in {seconds:.1f} s", err=True)

    def advance(self, amount: int) -> None:
        pass

    def note(self, line: str) -> None:
        click.echo(line, err=True)


class Terminal:
    """Progress as bars with amount, rate and time left."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Step]:
        task = self._bars.add_task(label, total=total, amount="")
        running = _Task(self._bars, task, total, unit)
        yield running
        running.advance(total - running.done)

    def note(self, line: str) -> None:
        self._bars.console.print(line, highlight=False, markup=False)


class _Task:
    """A bar that says how much of how much is done, and how fast."""

    def __init__(self, bars: Bars, task: Any, total: int, unit: str) -> None:
        self._bars, self._task, self._total, self._unit = bars, task, total, unit
        self._start = time.monotonic()
        self.done = 0

    def advance(self, amount: int) -> None:
        self.done += amount
        rate = self.done / max(time.monotonic() - self._start, 1e-3)
        done, total, each_second = map(self._show, (self.done, self._total, round(rate)))
        self._bars.update(
            self._task, completed=self.done, amount=f"{done} of {total}, {each_second}/s"
        )

    def _show(self, amount: int) -> str:
        return amount_of(amount, self._unit)


def amount_of(amount: int, unit: str) -> str:
    return size(amount) if unit == "B" else f"{amount:,} {unit}"


def size(nbytes: int) -> str:
    """Bytes in decimal units, three figures: ``269 MB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"
