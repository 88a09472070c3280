"""A measurement as a picture: one small plot for each scorer, side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import write_atomic
from compress.errors import BadInput
from compress.report.canvas import WIDE, need_matplotlib, picture
from compress.report.scores import Scores, draw_panels, panels_height
from compress.signals import Measurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
_LEGEND = 4  # columns


def check_picture(path: Path) -> None:
    """Refuse, before hours of work, a place where `write_picture` could not write.

    Raises `BadInput` for a suffix not in `SUFFIXES`, a directory, or a file in no directory or one
    that cannot be written; `Missing` without matplotlib.
    """
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise BadInput("cannot be written", where=path, mend="name a file in a directory")
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(
            "no kind of picture that can be drawn",
            where=path,
            got=f"suffix '{path.suffix}'",
            expected=" or ".join(SUFFIXES),
        )
    need_matplotlib()


def write_picture(found: Measurement, path: Path) -> None:
    """Draw the scores of all scorers with standard errors; an existing file is replaced.

    Protected blocks and those that write an attention sink are marked, and those that the scorer
    would remove first, as many as the measurement's ``drop``. Raises as `check_picture`.
    """
    check_picture(path)
    panels = _panels(found)
    columns = 1 if len(panels) == 1 else 2

    def draw(target: Figure) -> None:
        draw_panels(target, panels, columns, _LEGEND, gone=f"first {found.drop} to go")

    height = panels_height(len(panels), columns, _LEGEND)
    try:
        write_atomic(path, picture(path.suffix.lower()[1:], WIDE, height, draw))
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=path) from error


def _panels(found: Measurement) -> list[Scores]:
    table = found.table
    return [
        Scores(
            kind=found.granularity,
            scorer=scorer,
            blocks=range(table.blocks),
            values=table.means(scorer),
            errors=table.errors(scorer),
            gone=order[: found.drop],
            protected=found.protected,
            sinks=[block for block in range(table.blocks) if table.writes_sink(block)],
        )
        for scorer, order in found.orders().items()
    ]
