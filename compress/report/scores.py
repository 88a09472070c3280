"""Scores of blocks drawn against the blocks: those that go, those that are protected, the rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.report.canvas import LIGHT
from compress.report.wording import PARTS, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEGEND = 0.3  # inches that a line of it takes
_SINK = "writes a sink"


@dataclass(frozen=True)
class Scores:
    """What ``scorer`` finds of one kind of unit in each of ``blocks``; a low one can be removed.

    ``values`` and ``errors`` (standard errors) are None where unknown. ``gone``, ``protected`` and
    ``sinks``, the blocks that write an attention sink, are some of ``blocks``.
    """

    kind: str
    scorer: str
    blocks: Sequence[int]
    values: Sequence[float | None]
    errors: Sequence[float | None]
    gone: Collection[int]
    protected: Collection[int]
    sinks: Collection[int]


def draw_panels(
    target: Figure,
    panels: Sequence[Scores],
    columns: int,
    legend: int,
    gone: str = "removed",
) -> None:
    """One small plot each, row by row, of one range of blocks but each with its own scale.

    Their legend, in so many columns, stands once above them. ``gone``: what it calls those blocks.
    """
    rows = math.ceil(len(panels) / columns)
    grid = target.subplots(rows, columns, sharex=True, squeeze=False)
    blocks = [block for panel in panels for block in panel.blocks]
    marks = dict.fromkeys((gone, "protected", "other", _SINK))  # in this order
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        marks |= _draw(axes, panels[place], gone)
        axes.set_xlim(min(blocks) - 0.7, max(blocks) + 0.7)
        axes.locator_params(axis="x", integer=True, nbins=7 if columns > 1 else 12)
        if place + columns >= len(panels):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("block")
    names = [name for name, mark in marks.items() if mark]
    drawn = [mark for mark in marks.values() if mark]
    target.legend(drawn, names, loc="outside upper left", ncols=legend, handletextpad=0.2)


def panels_height(panels: int, columns: int, legend: int) -> float:
    """Inches that `draw_panels` wants."""
    return 0.4 + _LEGEND * math.ceil(4 / legend) + 1.7 * math.ceil(panels / columns)


def _draw(axes: Axes, scores: Scores, gone: str) -> dict[str, Any]:
    """One panel: crosses for what goes, hollow squares for what is protected, standard errors.

    Returns the marks by their names in a legend.
    """
    known = [
        (block, value, error or 0.0)
        for block, value, error in zip(scores.blocks, scores.values, scores.errors, strict=True)
        if value is not None
    ]
    for block in scores.gone:
        axes.axvspan(block - 0.5, block + 0.5, color=LIGHT["bad"], alpha=0.13, lw=0)
    axes.plot([b for b, _, _ in known], [v for _, v, _ in known], color=LIGHT["pale"], lw=1.2)
    drawn: set[int] = set()
    marks: tuple[tuple[str, set[int], dict[str, Any]], ...] = (
        (gone, set(scores.gone), {"marker": "X", "color": LIGHT["bad"], "ms": 6}),
        (
            "protected",
            set(scores.protected),
            {"marker": "s", "color": LIGHT["muted"], "mfc": "none", "ms": 5},
        ),
        ("other", set(scores.blocks), {"marker": "o", "color": LIGHT["accent"], "ms": 3.5}),
    )
    for label, members, style in marks:
        chosen = [point for point in known if point[0] in members - drawn]
        drawn |= members
        if chosen:
            places, values, errors = (list(part) for part in zip(*chosen, strict=True))
            axes.errorbar(places, values, errors, ls="", lw=1, label=label, zorder=3, **style)
    sinks = [point for point in known if point[0] in scores.sinks]
    if sinks:
        places, values, _ = (list(part) for part in zip(*sinks, strict=True))
        ring = axes.plot(places, values, "o", label=_SINK, mfc="none", ms=11, zorder=4)
        ring[0].set_color(LIGHT["warn"])
    fit_scale(axes, [value for _, value, _ in known])
    title = f"{PARTS.get(scores.kind, scores.kind)}: {scores.scorer}"
    axes.set_title(title, loc="left", fontsize=9, color=LIGHT["ink"])
    axes.grid(axis="y")
    handles, names = axes.get_legend_handles_labels()
    return dict(zip(names, handles, strict=True))


def fit_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic for a wide range, linear around zero where some are not above it."""
    from matplotlib.ticker import LogLocator

    if values and min(values) > 0:
        decades = math.log10(max(values)) - math.log10(min(values))
        if decades > 0.5:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    elif values:
        middle = sorted(map(abs, values))[len(values) // 2] or 1.0
        # Linear up to a power of ten, where the first ticks are.
        axes.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(middle)))
    axes.yaxis.set_major_formatter(lambda value, _: figure(value))
    axes.minorticks_off()
