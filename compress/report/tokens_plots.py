"""The plots about the pruning of tokens: losses by selector, entropy by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.report.canvas import LIGHT, Plot, plot, short_name
from compress.report.tokens import RANDOM, TokenPruning
from compress.report.wording import figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKED = 60  # layers that have a mark each


def draw_token_pruning(found: TokenPruning) -> dict[str, Plot]:
    """The plots by name; one that would show nothing is left out."""
    plots = {}
    if any(loss is not None for loss in found.losses.values()):
        plots["token_losses"] = _plot_losses(found)
    if any(entropy is not None for entropy in found.entropies):
        plots["token_entropies"] = _plot_entropies(found)
    return plots


def _plot_losses(found: TokenPruning) -> Plot:
    losses = {name: loss for name, loss in found.losses.items() if loss is not None}
    chance = losses.get(RANDOM)

    def draw(target: Figure, narrow: bool) -> None:
        axes = target.add_subplot()
        colours = {found.selector: LIGHT["accent"], RANDOM: LIGHT["warn"]}
        shown = [colours.get(name, LIGHT["pale"]) for name in losses]
        axes.barh(range(len(losses)), [*losses.values()], 0.62, color=shown)
        widest = max(map(abs, losses.values())) or 1.0
        for place, loss in enumerate(losses.values()):
            end = max(loss, 0) + widest * 0.012
            axes.text(end, place, figure(loss), va="center", color=LIGHT["ink"])
        if chance is not None:
            axes.axvline(chance, color=LIGHT["warn"], lw=1.2, ls="--", zorder=0.5)
        most = 16 if narrow else 34
        names = [_called(short_name(name, most), name == found.selector) for name in losses]
        axes.set_yticks(range(len(losses)), names)
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlim(min(0.0, *losses.values()), widest * (1.18 if narrow else 1.1))
        axes.set_ylim(len(losses) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=5 if narrow else 9)
        axes.xaxis.set_major_formatter(lambda value, _: figure(value))
        axes.set_xlabel("KL from the whole prompt, nats a token")

    words = ", ".join(
        f"{_called(name, name == found.selector)} {figure(loss)}" for name, loss in losses.items()
    )
    title = "Loss by selector of tokens, the chosen one in full colour"
    title += "; dashed: random tokens" * (chance is not None)
    height = 0.65 + 0.28 * len(losses)
    return plot("token_losses", title, words, (height, height), draw)


def _called(name: str, chosen: bool) -> str:
    return f"{name} (chosen)" if chosen else name


def _plot_entropies(found: TokenPruning) -> Plot:
    line = [math.nan if value is None else value for value in found.entropies]
    marks = {"tokens go before it": found.layer, "the entropy collapses": found.collapse}
    inside = {name: layer for name, layer in marks.items() if layer in range(len(line))}

    def draw(target: Figure, narrow: bool) -> None:
        axes = target.add_subplot()
        shown = "o-" if len(line) <= _MARKED else "-"
        axes.plot(range(len(line)), line, shown, color=LIGHT["accent"], ms=3.5, lw=1.4)
        if (chosen := inside.get("tokens go before it")) is not None:
            axes.axvline(chosen, color=LIGHT["bad"], lw=1.2, ls="--", label="tokens go before it")
        if (collapse := inside.get("the entropy collapses")) is not None:
            axes.plot(
                [collapse],
                [line[collapse]],
                "o",
                mfc="none",
                mec=LIGHT["warn"],
                ms=11,
                label="the entropy collapses",
            )
        axes.set_ylabel("entropy, 0 to 1")
        axes.set_xlabel("decoder layer, counted from 0")
        axes.set_xlim(-0.7, len(line) - 0.3)
        axes.locator_params(axis="x", integer=True, nbins=7 if narrow else 16)
        axes.yaxis.set_major_formatter(lambda value, _: figure(value))
        axes.grid(axis="y")
        if inside:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)

    words = [f"{layer} {figure(value)}" for layer, value in enumerate(found.entropies)]
    words += [f"{name}: layer {layer}" for name, layer in inside.items()]
    title = "Entropy of the tokens that enter each layer, before any goes"
    return plot("token_entropies", title, "; ".join(words), (2.5, 2.6), draw)
