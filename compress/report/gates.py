"""Gate results as a manifest holds them, and what they come to together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.values import count, entries, items, members, number, text
from compress.report.wording import figure, interval

# Worst first. "pending" gates were announced but never checked.
VERDICTS = ("failed", "undecided", "pending", "passed")


@dataclass(frozen=True)
class Row:
    """One checked number: ``value`` must stay at or below ``limit`` with all of [low, high].

    ``reference`` and ``candidate``: the two models' own figures. None where unknown or infinite.
    """

    name: str
    unit: str
    reference: float | None
    candidate: float | None
    value: float | None
    low: float | None
    high: float | None
    limit: float | None
    documents: int | None
    verdict: str
    note: str


@dataclass(frozen=True)
class Gate:
    """``reference``: the model that was compared with. ``exact``: rows are counts of differences,
    not estimates, and have no interval.

    ``details``: further findings, by name in words.
    """

    name: str
    config: dict[str, Any]
    verdict: str
    summary: str
    reference: str
    rows: list[Row]
    details: list[tuple[str, str]]

    @property
    def exact(self) -> bool:
        return self.name == "bit_exact"

    @property
    def confidence(self) -> float | None:
        return number(self.config.get("confidence"))


def read_gates(results: Any) -> list[Gate]:
    """The gates of a manifest, failed ones first."""
    gates = [_gate(result) for result in entries(results)]
    return sorted(gates, key=lambda gate: VERDICTS.index(gate.verdict))


def overall(gates: Sequence[Gate]) -> str:
    """The worst verdict, "not gated" where no gate is."""
    return worst([gate.verdict for gate in gates]) if gates else "not gated"


def worst(verdicts: Iterable[str]) -> str:
    return min(verdicts, key=VERDICTS.index)


def _gate(result: dict[str, Any]) -> Gate:
    rows = [_row(row) for row in entries(result.get("rows"))]
    # A gate cannot be better than its rows, whatever it says of itself.
    verdict = worst([_verdict(result.get("verdict")), *(row.verdict for row in rows)])
    return Gate(
        name=text(result.get("gate")) or "unnamed",
        config=members(result.get("config")),
        verdict=verdict,
        summary=text(result.get("summary")),
        reference=text(result.get("reference")),
        rows=rows,
        details=[
            (text(name, 100), words)
            for name, value in members(result.get("details")).items()
            if (words := _words(value))
        ],
    )


def _row(row: dict[str, Any]) -> Row:
    return Row(
        name=text(row.get("name")) or "unnamed",
        unit=text(row.get("unit")),
        reference=number(row.get("reference")),
        candidate=number(row.get("candidate")),
        value=number(row.get("value")),
        low=number(row.get("low")),
        high=number(row.get("high")),
        limit=number(row.get("limit")),
        documents=count(row.get("documents")),
        verdict=_verdict(row.get("verdict")),
        note=text(row.get("note")),
    )


def _verdict(value: Any) -> str:
    return value if value in VERDICTS else "undecided"


def _words(value: Any) -> str:
    """A finding in words: named values, or one."""
    if not isinstance(value, dict):
        return _one(value)
    named = {text(key, 100): _one(inner) for key, inner in value.items()}
    return ", ".join(f"{key} {words}" for key, words in named.items() if words)


def _one(value: Any) -> str:
    """Text, a number, or a number with its interval, given as ``[estimate, low, high]``."""
    if len(items(value)) == 3 and number(value[0]) is not None:
        estimate, low, high = map(number, value)
        return f"{figure(estimate)} {interval(low, high)}"
    return text(value) if number(value) is None else figure(number(value))
