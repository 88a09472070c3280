"""The report as one HTML file: no network, no script, light and dark, wide and narrow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from compress.report import pruning_words, quantization_words, tokens_words, wording
from compress.report.canvas import DARK, LIGHT, Plot
from compress.report.facts import Facts
from compress.report.gates import Gate, Row

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


@dataclass(frozen=True)
class Bar:
    """A row's interval beside its limit, as positions from 0 to 100; an infinite end is at one."""

    low: float
    value: float
    high: float
    limit: float


def html_page(facts: Facts, plots: Mapping[str, Plot]) -> bytes:
    """The page, UTF-8. Whatever the facts hold is escaped; ``plots`` are set in as they are."""
    title, sentence = wording.judgement(facts)
    page = _template().render(
        facts=facts,
        plots=plots,
        words=wording,
        pruned=pruning_words,
        quantized=quantization_words,
        token_words=tokens_words,
        title=title,
        sentence=sentence,
        tiles=_tiles(facts),
        bar=bar,
        light=LIGHT,
        dark=DARK,
    )
    return page.encode("utf-8", "replace")


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _code
    return environment.get_template("page.html.j2")


def bar(gate: Gate, row: Row) -> Bar | None:
    """Where to draw a row's interval; None where there is none or no limit."""
    if gate.exact or row.value is None or row.limit is None:
        return None
    known = [x for x in (row.low, row.value, row.high, row.limit) if x is not None]
    margin = (max(known) - min(known)) * 0.12 or 1.0
    start, end = min(known) - margin, max(known) + margin

    def place(x: float | None, unknown: float) -> float:
        return unknown if x is None else round(100 * (x - start) / (end - start), 1)

    return Bar(place(row.low, 0), place(row.value, 0), place(row.high, 100), place(row.limit, 0))


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """The figures that matter: what, how much, and what to hold it against."""
    total = facts.total
    before = f"of {wording.size(facts.bytes_before)}" if facts.bytes_before else "of weights"
    dense = 8 * total.nbytes / max(1, total.weights)
    tiles = [
        ("Weights on disk", wording.size(total.stored_nbytes), before),
        ("Bits per weight", f"{total.bits_per_weight:.2f}", f"uncoded {dense:.4g}"),
        ("Class", wording.kind(facts), f"{total.weights / 1e6:,.1f} M weights"),
    ]
    tiles += [pruning_words.tile(pruning) for pruning in facts.prunings]
    if facts.quantization:
        tiles.append(quantization_words.tile(facts.quantization))
    if facts.token_pruning:
        tiles.append(tokens_words.tile(facts.token_pruning))
    for gate in facts.gates:
        for row in gate.rows if gate.name == "perplexity" else []:
            if row.reference is not None and row.candidate is not None:
                pair = f"{wording.figure(row.reference)} → {wording.figure(row.candidate)}"
                tiles.append(("Perplexity", pair, f"{wording.figure(row.documents)} documents"))
    return tiles


def _code(sentence: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))
