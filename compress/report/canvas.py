"""A matplotlib drawing as SVG that follows a page's colours and font, and as PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import Missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Text has a contrast of at least 4.5 on `paper` and on `panel`. The light ones are what is drawn,
# so each must be unlike the others.
LIGHT = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b2430",
    "muted": "#566170",
    "line": "#d9dee5",
    "accent": "#2457a6",
    "pale": "#b9cdea",
    "bad": "#b3261e",
    "warn": "#855800",
    "good": "#1b6b38",
}
DARK = {
    "paper": "#12161c",
    "panel": "#1b212a",
    "ink": "#e6eaf0",
    "muted": "#a4afbd",
    "line": "#323c49",
    "accent": "#8ab4f8",
    "pale": "#3a5278",
    "bad": "#ff8f85",
    "warn": "#f0bf5c",
    "good": "#7fd49b",
}
WIDE, NARROW = 9.0, 4.1  # inches: a page's column, a phone held upright
_DPI = 144

Draw = Callable[["Figure", bool], None]
"""Draws into an empty figure; whether it is a narrow one."""


@dataclass(frozen=True)
class Plot:
    """``title``: one line; ``words``: what it shows, for those who do not see it; ``svg``:
    elements to be set into HTML, wide and narrow; ``png``: a file's bytes, on white."""

    title: str
    words: str
    svg: tuple[str, str]
    png: bytes


def need_matplotlib() -> None:
    """Raise `Missing` where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Missing(
            "matplotlib is not installed", mend="run: pip install 'entropress[report]'"
        ) from None


def plot(name: str, title: str, words: str, heights: tuple[float, float], draw: Draw) -> Plot:
    """A drawing of so many inches' height, wide and narrow. The same input gives the same bytes.

    ``name`` keeps the ids of the SVG's parts apart from those of other plots.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name with a glyph that the font lacks
        warnings.simplefilter("ignore", RuntimeWarning)  # numbers too large for a scale
        matplotlib.rcdefaults()
        svg = []
        for narrow, (width, height) in enumerate(zip((WIDE, NARROW), heights, strict=True)):
            matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": f"{name}{narrow}"})
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure, bool(narrow))
            svg.append(_svg(figure))
            if not narrow:
                figure.set_layout_engine("none")  # it has been laid out
                png = io.BytesIO()
                figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return Plot(title, words, (svg[0], svg[1]), png.getvalue())


def picture(kind: str, width: float, height: float, draw: Callable[[Figure], None]) -> bytes:
    """A drawing of so many inches as a file of its own, "png" or "svg", on white.

    The same input gives the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    nothing = dict.fromkeys(("Software",) if kind == "png" else ("Date", "Creator"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Letters as shapes: a file by itself cannot count on a font.
        matplotlib.rcParams.update(_STYLE | {"svg.fonttype": "path", "svg.hashsalt": "picture"})
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=_DPI, metadata=nothing)
    return file.getvalue()


def short_name(name: str, most: int) -> str:
    """A name that fits, without what cannot be drawn; its end says most."""
    clean = "".join(char if char.isprintable() else "?" for char in name)
    return clean if len(clean) <= most else f"…{clean[1 - most :]}"


_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # names of tensors are no formulas
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.fonttype": "none",
}


def _svg(figure: Figure) -> str:
    """The figure as an ``svg`` element: transparent, colours and font from CSS, no ids but used."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return text
