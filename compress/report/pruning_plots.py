"""The plots about pruning: scores by kind, the search's progress, the training of a healing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.report.canvas import LIGHT, Plot, plot
from compress.report.pruning import Pruning
from compress.report.pruning_words import steps_of
from compress.report.scores import Scores, draw_panels, panels_height
from compress.report.wording import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORDS = 60  # points of a curve that its description lists


def draw_pruning(prunings: Sequence[Pruning]) -> dict[str, Plot]:
    """The plots by name; one that would show nothing is left out."""
    found = {}
    if panels := _panels(prunings):
        found["scores"] = _plot_scores(panels)
    searches = [p.search for p in prunings if p.search and len(p.search.history) > 1]
    if searches:
        found["search"] = _plot_curves(
            "search",
            "The best set that the search knew",
            steps_of(searches[0]),
            [search.history for search in searches],
        )
    trained = [p.healing.history for p in prunings if p.healing and len(p.healing.history) > 1]
    if trained:
        title = "Training of the healing: its loss on the calibration text"
        found["healing"] = _plot_curves("healing", title, "step", trained)
    return found


def _panels(prunings: Sequence[Pruning]) -> list[Scores]:
    return [
        replace(scores, scorer=scores.scorer + f" (pruning {number})" * (len(prunings) > 1))
        for number, pruning in enumerate(prunings, 1)
        for scores in pruning.scores
    ]


def _plot_scores(panels: Sequence[Scores]) -> Plot:
    def draw(target: Figure, narrow: bool) -> None:
        draw_panels(target, panels, columns=1, legend=2 if narrow else 4)

    words = "; ".join(f"{panel.kind} by {panel.scorer}: {_said(panel)}" for panel in panels)
    heights = panels_height(len(panels), 1, 4), panels_height(len(panels), 1, 2)
    title = "Scores by block of the original model, with standard errors; low ones can be removed"
    return plot("scores", title, words, heights, draw)


def _said(scores: Scores) -> str:
    marks = {"removed": scores.gone, "protected": scores.protected, "writes a sink": scores.sinks}
    return ", ".join(
        " ".join([f"{block}", figure(value), *(mark for mark in marks if block in marks[mark])])
        for block, value in zip(scores.blocks, scores.values, strict=True)
    )


def _plot_curves(name: str, title: str, step: str, curves: Sequence[Sequence[float]]) -> Plot:
    """One panel for each curve, since each has been measured on its own text."""

    def draw(target: Figure, narrow: bool) -> None:
        every = target.subplots(len(curves), squeeze=False)[:, 0]
        for axes, curve in zip(every, curves, strict=True):
            shown = "o-" if len(curve) < 40 else "-"
            axes.plot(range(len(curve)), curve, shown, color=LIGHT["accent"], ms=3, lw=1.4)
            axes.set_ylabel("nats a token")
            axes.yaxis.set_major_formatter(lambda value, _: figure(value))
            axes.locator_params(axis="x", integer=True, nbins=7 if narrow else 12)
            axes.grid(axis="y")
            axes.set_xlabel(step)

    thinned = [curve[:: 1 + len(curve) // _WORDS] for curve in curves]
    words = "; ".join(" ".join(figure(value) for value in curve) for curve in thinned)
    height = 0.3 + 1.9 * len(curves)
    return plot(name, title, words, (height, height), draw)
