"""The plots about quantization: rates and noise by layer, searches, training."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from compress.report.canvas import LIGHT, Plot, plot, short_name
from compress.report.pruning import Removed
from compress.report.quantization import (
    Layer,
    LevelSearch,
    Quantization,
    RateSearch,
    Training,
)
from compress.report.scores import fit_scale
from compress.report.wording import PARTS, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_KINDS = 8  # that have a line of their own, the rest together being one
_OTHERS = "others"
_POINTS = 400  # of a curve; beyond, each is the mean of some
_WORDS = 60  # points of a curve that its description lists
_MARKED = 60  # blocks that have a mark each, and windows whose borders are drawn

_Line = list[tuple[int, float]]
_Panel = tuple[str, str, dict[str, _Line]]
"""What it shows, the label of its axis, its lines by kind of layer."""
_Curve = tuple[str, str, Sequence[tuple[float, float]]]
"""What it shows, the label of its axis, its points."""


def draw_quantization(found: Quantization) -> dict[str, Plot]:
    """The plots by name; one that would show nothing is left out."""
    plots = {}
    if rates := _rate_panels(found):
        plots["rates"] = _plot_rates(rates)
    if found.rate_search and any(ratio is not None for _, ratio in found.rate_search.trials):
        plots["perplexity"] = _plot_trials(found.rate_search)
    if found.level_search and (found.level_search.history or found.level_search.blocks):
        plots["levels"] = _plot_levels(found.level_search, found.dropped)
    if found.training and (curves := _training_panels(found.training)):
        plots["training"] = _plot_training(found.training, curves)
    return plots


def _rate_panels(found: Quantization) -> list[_Panel]:
    """Those that have a line."""
    rate, unit = "bits per weight as stored, scales included", "bits per weight, stored"
    if found.coded:
        rate, unit = "coded bits per weight, scales included", "coded bits per weight"
    every = [
        (rate, unit, _by_kind(found.layers, lambda layer: layer.bits)),
        ("SQNR", "SQNR, dB", _by_kind(found.layers, lambda layer: layer.sqnr)),
    ]
    return [panel for panel in every if panel[2]]


def _by_kind(layers: Sequence[Layer], value: Callable[[Layer], float | None]) -> dict[str, _Line]:
    """The mean in each block of the layers of a kind, for the commonest kinds."""
    inside = [layer for layer in layers if layer.block is not None]
    counted = Counter(layer.kind for layer in inside)
    kinds = [*counted]
    if len(kinds) > _MOST_KINDS:
        kinds = [kind for kind, _ in counted.most_common(_MOST_KINDS - 1)]
    values: dict[str, defaultdict[int, list[float]]]
    values = {kind: defaultdict(list) for kind in [*kinds, _OTHERS]}
    for layer in inside:
        if layer.block is not None and (known := value(layer)) is not None:
            line = values[layer.kind if layer.kind in kinds else _OTHERS]
            line[layer.block].append(known)
    means = {
        kind: [(block, math.fsum(of) / len(of)) for block, of in sorted(blocks.items())]
        for kind, blocks in values.items()
    }
    return {kind: line for kind, line in means.items() if line}


def _plot_rates(panels: Sequence[_Panel]) -> Plot:
    kinds = list(dict.fromkeys(kind for _, _, lines in panels for kind in lines))

    def draw(target: Figure, narrow: bool) -> None:
        shape = (len(panels), 1) if narrow else (1, len(panels))
        every = target.subplots(*shape, squeeze=False, sharex=True).flat
        for axes, (_, unit, lines) in zip(every, panels, strict=True):
            for kind, line in lines.items():
                style = _style(kinds.index(kind), len(line))
                axes.plot(*zip(*line, strict=True), label=short_name(kind, 24), **style)
            axes.set_ylabel(unit)
            axes.grid(axis="y")
            _blocks(axes, narrow)
        handles, labels = every[0].get_legend_handles_labels()
        columns = 3 if narrow else 8
        target.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.6)

    words = "; ".join(
        f"{unit} of {kind}: {', '.join(f'{block} {figure(value)}' for block, value in line)}"
        for _, unit, lines in panels
        for kind, line in lines.items()
    )
    title = f"Quantized layers through the depth: {'; '.join(shown for shown, _, _ in panels)}"
    return plot("rates", title, words, (3.0, 0.9 + 2.2 * len(panels)), draw)


def _style(place: int, points: int) -> dict[str, Any]:
    """A line unlike the others, also for those who see no colours."""
    colours = [LIGHT[name] for name in ("accent", "warn", "good", "muted")]
    mark = "os^Dvp*h"[place % 8] if points <= _MARKED else ""
    dashed = place >= len(colours)
    return {
        "color": colours[place % len(colours)],
        "ls": "--" if dashed else "-",
        "marker": mark,
        "ms": 3.5,
        "lw": 1.2,
        **({"mfc": LIGHT["paper"]} if dashed else {}),
    }


def _plot_trials(search: RateSearch) -> Plot:
    known = [(rate, ratio) for rate, ratio in search.trials if ratio is not None]

    def draw(target: Figure, narrow: bool) -> None:
        axes = target.add_subplot()
        axes.plot(*zip(*known, strict=True), "o-", color=LIGHT["accent"], ms=4.5, lw=1.2)
        levels = [ratio for _, ratio in known]
        if search.limit is not None:
            levels.append(search.limit)
            axes.axhline(search.limit, color=LIGHT["bad"], lw=1.2, ls="--")
            axes.annotate(
                f"limit {figure(search.limit)}",
                (1, search.limit),
                (0, 3),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                ha="right",
                color=LIGHT["bad"],
            )
        fit_scale(axes, levels)
        axes.set_xlabel("coded bits per weight, scales included")
        axes.set_ylabel("ratio of perplexities")
        axes.grid(axis="y")

    words = ", ".join(f"{figure(rate)} bits {figure(ratio)}" for rate, ratio in search.trials)
    title = "Search of the rate: perplexity against that of the model itself"
    return plot("perplexity", title, f"limit {figure(search.limit)}; {words}", (2.6, 2.6), draw)


def _plot_levels(search: LevelSearch, dropped: Removed) -> Plot:
    curve = _thinned(search.history, _POINTS)
    panels = [name for name, there in (("history", curve), ("levels", search.blocks)) if there]

    def draw(target: Figure, narrow: bool) -> None:
        every = dict(zip(panels, target.subplots(len(panels), squeeze=False)[:, 0], strict=True))
        if axes := every.get("history"):
            shown = "o-" if len(curve) <= _MARKED else "-"
            axes.plot(*zip(*curve, strict=True), shown, color=LIGHT["accent"], ms=3, lw=1.4)
            axes.set_ylabel("nats a token")
            axes.set_xlabel("generation")
            axes.yaxis.set_major_formatter(lambda value, _: figure(value))
            axes.locator_params(axis="x", integer=True, nbins=7 if narrow else 12)
            axes.grid(axis="y")
        if axes := every.get("levels"):
            _draw_levels(axes, search, dropped, columns=2 if narrow else 4)
            _blocks(axes, narrow)

    said = [
        f"{PARTS[part]}: "
        + ", ".join(
            f"{block} {'left out' if block in dropped.get(part, []) else figure(value)}"
            for block, value in zip(search.blocks, values, strict=True)
        )
        for part, values in search.levels.items()
    ]
    words = f"KL {_listed(search.history)}; {'; '.join(said)}"
    title = (
        "Search of levels: the best KL known; by how many octaves the steps of each part of a "
        "block are wider than the common one"
    )
    height = 0.5 + 1.9 * len(panels)
    return plot("levels", title, words, (height, height + 0.3), draw)


def _draw_levels(axes: Axes, search: LevelSearch, dropped: Removed, columns: int) -> None:
    """Crosses at the bottom for what was left out, whatever else is said of it."""
    for place, (part, values) in enumerate(search.levels.items()):
        gone = dropped.get(part, [])
        line = [
            math.nan if value is None or block in gone else value
            for block, value in zip(search.blocks, values, strict=True)
        ]
        style = _style(place, len(line))
        axes.plot(search.blocks, line, label=PARTS[part], **style)
        if gone:
            axes.plot(
                gone,
                [0.06 + 0.08 * place] * len(gone),
                "X",
                transform=axes.get_xaxis_transform(),
                color=LIGHT["bad"],
                mec=style["color"],
                ms=7,
                label=f"{PARTS[part]} left out",
            )
    axes.axhline(0, color=LIGHT["line"], lw=1)
    axes.margins(y=0.28)
    axes.set_ylabel("octaves wider")
    axes.grid(axis="y")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0)


def _training_panels(training: Training) -> list[_Curve]:
    """Those that have a point."""
    every: tuple[_Curve, ...] = (
        ("loss", "loss", _thinned(training.history, _POINTS)),
        ("hidden error behind each window", "hidden error", training.errors),
        ("entropy of each block's output", "entropy", training.entropies),
    )
    return [panel for panel in every if panel[2]]


def _plot_training(training: Training, panels: Sequence[_Curve]) -> Plot:
    def draw(target: Figure, narrow: bool) -> None:
        grid = target.subplots(len(panels), squeeze=False)[:, 0]
        for (_, label, points), axes in zip(panels, grid, strict=True):
            shown = "-" if label == "loss" or len(points) > _MARKED else "o-"
            axes.plot(*zip(*points, strict=True), shown, color=LIGHT["accent"], ms=3.5, lw=1.2)
            fit_scale(axes, [value for _, value in points])
            axes.set_ylabel(label)
            axes.grid(axis="y")
            borders: Sequence[float] = [last + 0.5 for _, last in training.windows[:-1]]
            _blocks(axes, narrow)
            if label == "loss":
                borders = training.borders
                axes.set_xlabel("step of training")
            else:
                axes.set_xlim(*limits)
            for border in borders if len(borders) < _MARKED else []:
                axes.axvline(border, color=LIGHT["muted"], lw=0.8, ls="--")
        target.align_ylabels()

    blocks = [last for _, last in training.windows] + [block for block, _ in training.entropies]
    limits = (-0.7, max(blocks, default=0) + 0.7)
    ends = ", ".join(f"{first} to {last}" for first, last in training.windows)
    words = [f"loss {_listed(training.history)}", *[f"windows of blocks {ends}"] * bool(ends)]
    words += [
        f"{name}: " + ", ".join(f"{block} {figure(value)}" for block, value in points)
        for name, label, points in panels
        if label != "loss"
    ]
    title = f"Training: {', '.join(name for name, _, _ in panels)}"
    title += "; dashed: borders of windows" * (1 < len(training.windows) <= _MARKED)
    height = 0.4 + 1.75 * len(panels)
    return plot("training", title, "; ".join(words), (height, height), draw)


def _blocks(axes: Axes, narrow: bool) -> None:
    axes.set_xlabel("block of the original model")
    axes.locator_params(axis="x", integer=True, nbins=7 if narrow else 10)


def _thinned(values: Sequence[float], most: int) -> list[tuple[float, float]]:
    """At most so many points by their places from 0, each the mean of as many values."""
    each = math.ceil(len(values) / most) or 1
    parts = [values[start : start + each] for start in range(0, len(values), each)]
    return [
        (number * each + (len(part) - 1) / 2, math.fsum(part) / len(part))
        for number, part in enumerate(parts)
    ]


def _listed(values: Sequence[float]) -> str:
    return " ".join(figure(value) for _, value in _thinned(values, _WORDS))
