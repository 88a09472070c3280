"""All gates of a recipe, one after another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from compress.checkpoint import Checkpoint
from compress.errors import BadInput, Corrupt
from compress.gates.base import GateResult, Subject, get, recorded
from compress.stages import StageConfig


class GateSpec(Protocol):
    """A gate by name with its checked options."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> StageConfig: ...


def plan_gates(specs: Iterable[GateSpec], reference: Checkpoint) -> None:
    """Raise for the first gate that could not be checked: a task or a text that is not there."""
    for spec in specs:
        get(spec.name).plan(reference, spec.config)


def pending(specs: Iterable[GateSpec]) -> list[GateResult]:
    """What a manifest says of gates before they were checked."""
    return [
        GateResult(
            gate=spec.name,
            config=recorded(spec.config),
            verdict="pending",
            summary="not checked yet",
        )
        for spec in specs
    ]


def run_gates(specs: Iterable[GateSpec], subject: Subject) -> list[GateResult]:
    """Check every gate, failed ones before it or not.

    A candidate that cannot even be compared (NaN logits, another tokenizer, damaged files) has
    failed: its result says why. Raises `Missing` where the environment lacks something.
    """
    return [_check(spec, subject) for spec in specs]


def _check(spec: GateSpec, subject: Subject) -> GateResult:
    try:
        return get(spec.name).check(subject, spec.config)
    except (BadInput, Corrupt) as error:
        return failed(spec.name, spec.config, subject.reference, str(error))


def failed(gate: str, config: StageConfig, reference: Checkpoint, why: str) -> GateResult:
    """The result where there was nothing to compare."""
    return GateResult(
        gate=gate,
        config=recorded(config),
        verdict="failed",
        summary=why,
        reference=reference.source.id,
    )
