"""The plots of a report: sizes by kind, entropy by block, exponents and their codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compress.evaluate import SizeRow
from compress.report.canvas import LIGHT, Plot, plot
from compress.report.exponents import Histogram
from compress.report.facts import Facts, Layer, Pruning
from compress.report.wording import figure, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_KINDS = 14
_RAREST = 1e-6  # share of the weights below which an exponent is not drawn


def draw_all(facts: Facts) -> dict[str, Plot]:
    """The plots by name; one that would show nothing is left out."""
    found = {"sizes": _plot_sizes(facts)}
    if facts.layers or facts.prunings:
        found["entropy"] = _plot_entropy(facts)
    if facts.histogram:
        found["exponents"] = _plot_exponents(facts.histogram)
    return found


def _plot_sizes(facts: Facts) -> Plot:
    rows = facts.kinds[:_MOST_KINDS]
    scale, unit = _unit(max((row.nbytes for row in rows), default=0))

    def draw(target: Figure, narrow: bool) -> None:
        axes = target.add_subplot()
        places = range(len(rows))
        widest = max((row.nbytes for row in rows), default=0) / scale or 1
        axes.barh(places, [row.nbytes / scale for row in rows], 0.62, color=LIGHT["pale"])
        axes.barh(places, [row.stored_nbytes / scale for row in rows], 0.62, color=LIGHT["accent"])
        for place, row in zip(places, rows, strict=True):
            end = max(row.nbytes, row.stored_nbytes) / scale
            bits = f"{row.bits_per_weight:.2f}{'' if narrow else ' bits'}"
            axes.text(end + widest * 0.012, place, bits, va="center", color=LIGHT["ink"])
        axes.set_yticks(places, [_short(row.group, 18 if narrow else 34) for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlim(0, widest * (1.16 if narrow else 1.1))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"{unit}; beside the bars: stored bits per weight")

    height = 0.75 + 0.28 * max(1, len(rows))
    words = "; ".join(f"{row.group}: {_said(row)}" for row in rows)
    title = "Sizes by kind of tensor: uncoded pale, stored in full colour"
    return plot("sizes", title, words, (height, height), draw)


def _said(row: SizeRow) -> str:
    stored, bits = size(row.stored_nbytes), f"{row.bits_per_weight:.2f}"
    return f"{stored} of {size(row.nbytes)}, {bits} bits per weight"


def _plot_entropy(facts: Facts) -> Plot:
    panels: list[Callable[[Axes], None]] = []
    if facts.layers:
        panels.append(lambda axes: _draw_layers(axes, facts.layers))
    for pruning in facts.prunings:
        panels.append(lambda axes, pruning=pruning: _draw_scores(axes, pruning))  # type: ignore[misc]
    blocks = [layer.block for layer in facts.layers] + facts.removed

    def draw(target: Figure, narrow: bool) -> None:
        every = target.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(every, panels, strict=True):
            for block in facts.removed:
                axes.axvspan(block - 0.5, block + 0.5, color=LIGHT["bad"], alpha=0.13, lw=0)
            panel(axes)
            axes.grid(axis="y")
        every[-1].set_xlabel("block of the original model" + "; removed: red" * bool(facts.removed))
        every[-1].set_xlim(min(blocks) - 0.7, max(blocks) + 0.7)
        target.align_ylabels()
        every[-1].xaxis.get_major_locator().set_params(integer=True, nbins=7 if narrow else 16)

    words = [f"block {layer.block} {layer.bits:.3f} bits" for layer in facts.layers]
    words += [f"block {block} removed" for block in facts.removed]
    title = "Entropy of the weights' exponents by block"
    if facts.prunings:
        title += ", and the scores that blocks were removed by"
    height = 0.7 + 1.75 * len(panels)
    return plot("entropy", title, "; ".join(words), (height, height), draw)


def _draw_layers(axes: Axes, layers: list[Layer]) -> None:
    blocks, line = [], []
    for before, layer in zip([None, *layers], layers, strict=False):
        if before and layer.block > before.block + 1:  # a gap where a block is missing
            blocks.append(before.block + 1)
            line.append(math.nan)
        blocks.append(layer.block)
        line.append(layer.bits)
    axes.plot(blocks, line, "o-", color=LIGHT["accent"], ms=3.5, lw=1.4)
    axes.set_ylabel("exponent bits")


def _draw_scores(axes: Axes, pruning: Pruning) -> None:
    """Removed blocks as crosses, protected ones as hollow squares, with standard errors."""
    known = [
        (block, score, error or 0.0)
        for block, score, error in zip(pruning.blocks, pruning.scores, pruning.errors, strict=True)
        if score is not None
    ]
    marks: list[tuple[str, set[int], dict[str, Any]]] = [
        ("removed", set(pruning.removed), {"marker": "X", "color": LIGHT["bad"], "ms": 6}),
        (
            "protected",
            set(pruning.protected),
            {"marker": "s", "color": LIGHT["muted"], "mfc": "none", "ms": 5},
        ),
        ("kept", set(pruning.blocks), {"marker": "o", "color": LIGHT["accent"], "ms": 3.5}),
    ]
    axes.plot([b for b, _, _ in known], [s for _, s, _ in known], color=LIGHT["pale"], lw=1.2)
    drawn: set[int] = set()
    for label, members, style in marks:
        chosen = [point for point in known if point[0] in members - drawn]
        drawn |= members
        if chosen:
            places, scores, errors = (list(part) for part in zip(*chosen, strict=True))
            axes.errorbar(places, scores, errors, ls="", lw=1, label=label, zorder=3, **style)
    scores = [score for _, score, _ in known]
    if scores and min(scores) > 0:
        axes.set_yscale("log")
    elif scores:
        middle = sorted(map(abs, scores))[len(scores) // 2] or 1.0
        # Linear up to a power of ten, where the first ticks are.
        axes.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(middle)))
    axes.yaxis.set_major_formatter(lambda value, _: figure(value))
    axes.minorticks_off()
    axes.set_ylabel(_short(pruning.scorer, 18))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handletextpad=0.2, borderpad=0)


def _plot_exponents(histogram: Histogram) -> Plot:
    total = sum(histogram.counts)
    shares = {byte: n / total for byte, n in enumerate(histogram.counts) if n}
    drawn = [byte for byte, share in shares.items() if share >= _RAREST]
    places = _side_by_side(drawn)
    # Where the byte is the exponent itself, powers of two are what people know.
    bias = 127 if histogram.dtype in ("BF16", "F32") else 0
    names = ["zero" if bias and not byte else f"{byte - bias}".replace("-", "−") for byte in drawn]

    def draw(target: Figure, narrow: bool) -> None:
        above, below = target.subplots(2, sharex=True)
        above.bar(places, [100 * shares[byte] for byte in drawn], 0.8, color=LIGHT["accent"])
        above.set_ylabel("% of weights")
        ideal = [-math.log2(shares[byte]) for byte in drawn]
        below.step(places, ideal, where="mid", color=LIGHT["warn"], lw=1.2, label="−log₂ of share")
        lengths = [histogram.lengths[byte] for byte in drawn]
        below.plot(places, lengths, "o", color=LIGHT["accent"], ms=4, label="length of the code")
        below.set_ylabel("bits")
        below.set_ylim(0)
        below.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
        every = 1 + len(drawn) // (10 if narrow else 24)
        below.set_xticks(places[::-every], names[::-every])
        below.set_xlabel("power of two" if bias else "byte that holds the exponent")
        for axes in (above, below):
            axes.grid(axis="y")
        target.align_ylabels()

    common = sorted(drawn, key=lambda byte: -shares[byte])[:8]
    words = "; ".join(
        f"{byte - bias}: {shares[byte]:.1%} of weights, code of {histogram.lengths[byte]} bits"
        for byte in common
    )
    title = f"{histogram.dtype} exponents, and the lengths of a Huffman code for them"
    return plot("exponents", title, words, (3.5, 3.5), draw)


def _side_by_side(numbers: list[int]) -> list[int]:
    """Places for ascending numbers: neighbours touch, any gap is one place wide."""
    places: list[int] = []
    for before, here in zip([None, *numbers], numbers, strict=False):
        step = 0 if before is None else min(2, here - before)
        places.append(places[-1] + step if places else 0)
    return places


def _unit(nbytes: int) -> tuple[float, str]:
    return next(
        (scale, unit)
        for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
        if nbytes >= scale or scale == 1
    )


def _short(name: str, most: int) -> str:
    """A name that fits, without what cannot be drawn; its end says most."""
    clean = "".join(char if char.isprintable() else "?" for char in name)
    return clean if len(clean) <= most else f"…{clean[1 - most :]}"
