"""What a gate is: a claim about a candidate and its reference, checked, with numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, Field

from compress.checkpoint import Checkpoint
from compress.evaluate import EvalOptions, Interval, Verdict
from compress.progress import SILENT, Progress
from compress.registry import Registry
from compress.stages import StageConfig


class ModelGateConfig(StageConfig):
    """Options of gates that run the models.

    ``dtype``: what to compute in, "auto" for the stored one. ``device``: as torch names it, "auto"
    for CUDA where there is some. ``confidence``: of the two-sided interval whose worse end counts.
    """

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    seed: int = 0


class Row(BaseModel):
    """One checked number. ``value`` is held against ``limit`` by its worse end, ``high``.

    ``reference`` and ``candidate``: the two models' own figures. ``documents``: how many documents,
    tensors or prompts it rests on. What is not defined is None, infinities included: JSON has none.
    """

    name: str
    unit: str = ""
    reference: float | None = None
    candidate: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    documents: int | None = None
    verdict: Verdict
    note: str = ""


class GateResult(BaseModel):
    """What a gate found; stored in the manifest. ``summary``: one line, by how much."""

    gate: str
    config: dict[str, Any]
    verdict: Verdict | Literal["pending"]
    summary: str
    reference: str = ""
    rows: list[Row] = []
    details: dict[str, Any] = {}


@dataclass(frozen=True)
class Subject:
    """What gates look at. ``journal``: where a candidate's answers are kept to resume from."""

    reference: Checkpoint
    candidate: Checkpoint
    journal: Path
    progress: Progress = SILENT


class Gate(Protocol):
    """A kind of proof. Gates hold no state."""

    name: ClassVar[str]
    Config: ClassVar[type[StageConfig]]

    def plan(self, reference: Checkpoint, config: Any) -> None:
        """Raise `BadInput` or `Missing` for what can be known to fail before anything is made."""

    def check(self, subject: Subject, config: Any) -> GateResult:
        """Compare, and say how it ended. Raises `BadInput` where no comparison is possible."""


_GATES: Registry[Gate] = Registry("gate")
register, get, names = _GATES.register, _GATES.get, _GATES.names


def worst(rows: Iterable[Row]) -> Verdict:
    """The verdict of a gate from those of its rows: passed only if every one passed."""
    verdicts = {row.verdict for row in rows}
    return (
        "failed" if "failed" in verdicts else "undecided" if "undecided" in verdicts else "passed"
    )


def bounded(name: str, interval: Interval, limit: float, **facts: Any) -> Row:
    """A row for an estimate that must stay below a limit with all of its interval."""
    return Row(
        name=name,
        value=finite(interval.estimate),
        low=finite(interval.low),
        high=finite(interval.high),
        limit=limit,
        verdict=interval.verdict(limit),
        **facts,
    )


def against(row: Row) -> str:
    """A row's number, interval and limit in words, with what is wrong with it."""
    low, high = (
        "-∞" if row.low is None else f"{row.low:.4g}",
        "∞" if row.high is None else f"{row.high:.4g}",
    )
    line = f"{row.value:.4g} [{low}, {high}], at most {row.limit:.4g}"
    if row.verdict == "passed" or row.value is None or row.limit is None:
        return line
    if row.verdict == "failed":
        line += f": {row.value - row.limit:.3g} too much"
    else:
        beyond = "" if row.high is None else f" by {row.high - row.limit:.3g}"
        line += f": undecided, the interval reaches beyond{beyond}"
    return f"{line} ({row.documents} documents{', ' + row.note if row.note else ''})"


def eval_options(config: ModelGateConfig) -> EvalOptions:
    """What lm-eval is to run, from a gate's options of the same names."""
    known = {field.name for field in fields(EvalOptions)}
    return EvalOptions(**{name: value for name, value in config if name in known})


def recorded(config: StageConfig) -> dict[str, Any]:
    """The options of a gate or stage as plain data without a path of this machine, be the file
    there or not."""
    options = config.model_dump(mode="json")
    for key in ("data", "include_path", "inputs"):
        if options.get(key) and not options[key].startswith("builtin:"):
            options[key] = Path(options[key]).name
    return options


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
