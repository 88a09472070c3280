"""The plots of a report: pruning, quantization, tokens, sizes, entropies, exponents and codes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.evaluate import SizeRow
from compress.report.canvas import LIGHT, Plot, plot, short_name
from compress.report.exponents import Histogram
from compress.report.facts import Facts, Layer
from compress.report.pruning_plots import draw_pruning
from compress.report.quantization_plots import draw_quantization
from compress.report.tokens_plots import draw_token_pruning
from compress.report.wording import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_KINDS = 14
_RAREST = 1e-6  # share of the weights below which an exponent is not drawn


def draw_all(facts: Facts) -> dict[str, Plot]:
    """The plots by name; one that would show nothing is left out."""
    found = draw_pruning(facts.prunings)
    if facts.quantization:
        found |= draw_quantization(facts.quantization)
    if facts.token_pruning:
        found |= draw_token_pruning(facts.token_pruning)
    found["sizes"] = _plot_sizes(facts)
    if facts.layers:
        found["entropy"] = _plot_entropy(facts.layers, facts.removed.get("block", []))
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
        axes.set_yticks(places, [short_name(row.group, 18 if narrow else 34) for row in rows])
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


def _plot_entropy(layers: list[Layer], gone: list[int]) -> Plot:
    blocks = [layer.block for layer in layers] + gone

    def draw(target: Figure, narrow: bool) -> None:
        axes = target.add_subplot()
        for block in gone:
            axes.axvspan(block - 0.5, block + 0.5, color=LIGHT["bad"], alpha=0.13, lw=0)
        _draw_layers(axes, layers)
        axes.grid(axis="y")
        axes.set_xlabel("block of the original model" + "; removed: red" * bool(gone))
        axes.set_xlim(min(blocks) - 0.7, max(blocks) + 0.7)
        axes.locator_params(axis="x", integer=True, nbins=7 if narrow else 16)

    words = [f"block {layer.block} {layer.bits:.3f} bits" for layer in layers]
    words += [f"block {block} removed" for block in gone]
    title = "Entropy of the weights' exponents by block"
    return plot("entropy", title, "; ".join(words), (2.45, 2.45), draw)


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
