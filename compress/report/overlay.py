"""An image of a manifest with its patches, drawn such that those that were dropped are dark."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from compress.report.png import png_size
from compress.report.values import count, items

_MOST_SIDE = 224  # pixels
_MOST_CODED = 300_000  # characters of base64: more than as many pixels can need
_MOST_PATCHES = 128  # a side


@dataclass(frozen=True)
class Overlay:
    """``image``: a PNG of ``width`` by ``height`` pixels in base64, safe to be set into HTML;
    ``kept``: those of its ``rows`` by ``columns`` patches that stay, row by row."""

    image: str
    width: int
    height: int
    rows: int
    columns: int
    kept: frozenset[int]

    @property
    def scale(self) -> str:
        """From patches to pixels, as a transform of SVG has it."""
        return f"scale({self.width / self.columns:.6g} {self.height / self.rows:.6g})"

    @property
    def veil(self) -> str:
        """A path of SVG over the patches that are not kept, a unit a patch."""
        return "".join(self._runs(kept=False))

    @property
    def frames(self) -> str:
        """One around those that are."""
        return "".join(self._runs(kept=True))

    def _runs(self, kept: bool) -> Iterator[str]:
        for row in range(self.rows):
            patches = range(row * self.columns, (row + 1) * self.columns)
            for inside, run in groupby(patches, self.kept.__contains__):
                first, *rest = run
                if inside == kept:
                    start = first - patches.start
                    yield f"M{start} {row}h{1 + len(rest)}v1H{start}z"

    def words(self) -> str:
        """What it shows, for those who do not see it."""
        rows = (range(row * self.columns, (row + 1) * self.columns) for row in range(self.rows))
        each = " ".join(str(len(self.kept.intersection(row))) for row in rows)
        return f"{self.caption()}; the others are darkened. They are, row by row: {each}."

    def caption(self) -> str:
        total = self.rows * self.columns
        return f"{len(self.kept):,} of {total:,} patches stay"


def read_overlay(entry: dict[str, Any]) -> Overlay | None:
    """None for what is not exactly a small PNG with a grid, and patches of it that were kept."""
    coded = entry.get("image")
    if not isinstance(coded, str) or len(coded) > _MOST_CODED:
        return None
    try:
        image = base64.b64decode(coded, validate=True)
    except ValueError:
        return None
    size = png_size(image, _MOST_SIDE)
    rows, columns = count(entry.get("rows")), count(entry.get("columns"))
    if size is None or not rows or not columns or max(rows, columns) > _MOST_PATCHES:
        return None
    kept = [count(patch) for patch in items(entry.get("kept"))[: rows * columns + 1]]
    known = frozenset(patch for patch in kept if patch is not None and patch < rows * columns)
    if not known or len(known) != len(kept):
        return None
    return Overlay(coded, *size, rows, columns, known)
