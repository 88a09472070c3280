"""`write_report`: the page, the card and the plots as files."""

from __future__ import annotations

from pathlib import Path

from compress import checkpoint as room
from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.report.canvas import need_matplotlib
from compress.report.card import is_ours, model_card
from compress.report.facts import collect_facts, read_card
from compress.report.page import html_page
from compress.report.plots import draw_all


def write_report(path: Path, output: Path | None = None, progress: Progress = SILENT) -> list[Path]:
    """Describe a published directory in ``report.html``, ``README.md`` and ``report/*.png``.

    They go into ``output``, by default into ``path`` itself, and are returned in this order. A
    model card that ``path`` holds is carried over: its own part stands below ours, once however
    often this runs. The same directory gives the same bytes.

    Raises `BadInput` for a directory without manifest, and where ``output`` is another one that
    holds a README.md which is not ours or cannot be written; `Missing` without matplotlib;
    `Corrupt` as reading the tensors does.
    """
    need_matplotlib()
    output = output or path
    target = output / room.CARD
    if output.resolve() != path.resolve() and target.is_file() and not is_ours(read_card(target)):
        raise BadInput(
            "exists already and is no report's",
            where=target,
            mend="choose another directory for the report",
        )
    facts = collect_facts(path, progress)
    plots = draw_all(facts)
    files = {
        room.REPORT: html_page(facts, plots),
        room.CARD: model_card(facts, plots),
    } | {f"{room.REPORT_FOLDER}/{name}.png": plot.png for name, plot in plots.items()}
    try:
        (output / room.REPORT_FOLDER).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            room.write_atomic(output / name, content)
    except OSError as error:
        raise BadInput(f"cannot be written: {error.strerror}", where=output) from error
    return [output / name for name in files]
