"""What `tokens.py` draws: accuracies against the share of visual tokens that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokens_measures import CHANCE, RANDOM, WHOLE

from compress.tokens import SELECTORS

INK, MUTED, LINE = "#1b2430", "#566170", "#d9dee5"
ENTROPIES = {
    "logdet": "#2457a6",
    "von_neumann": "#b3261e",
    "renyi2": "#855800",
    "released": "#1b6b38",
}
OTHERS = [name for name in SELECTORS if name not in ENTROPIES]

Curves = dict[str, dict[float, float]]
"""By selector, and "whole", the accuracies by share of tokens kept."""


def plot(panels: dict[str, Curves], path: Path) -> None:
    """A panel a model and layer, as SVG, PNG or PDF; the entropies stand out, and chance."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "entropress"
    from matplotlib import pyplot

    size = 4.2 * len(panels), 3.8
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        axis.axhline(curves[WHOLE][1.0], color=INK, linewidth=1, linestyle=":", label=WHOLE)
        axis.axhline(CHANCE, color=LINE, linewidth=1)
        for name, found in curves.items():
            if name != WHOLE:
                axis.plot(*zip(*found.items(), strict=True), label=name, **_style(name))
        keeps = sorted({keep for name in OTHERS for keep in curves[name]})
        axis.set_xscale("log", base=2)
        axis.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
        axis.set(title=title, xlabel="share of visual tokens kept", ylim=(0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("accuracy")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def _style(name: str) -> dict[str, Any]:
    if name in ENTROPIES:
        return {"color": ENTROPIES[name], "linewidth": 2, "marker": "o", "markersize": 4}
    style = {"color": MUTED, "marker": "osD^vP"[OTHERS.index(name)], "markersize": 4}
    return style | ({"linewidth": 2, "linestyle": "--"} if name == RANDOM else {"linewidth": 0.8})
