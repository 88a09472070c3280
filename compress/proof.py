"""Evaluations and gates on a checkpoint that exists, whoever made it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compress import checkpoint as room
from compress import gates
from compress import recipe as recipes
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, EntropressError
from compress.evaluate import (
    EvalOptions,
    Evaluation,
    load_tasks,
    model_identity,
    reference_journal,
    run_tasks,
    save,
)
from compress.gates import GateResult, LmEvalConfig, Row, Subject
from compress.paths import cache_dir
from compress.progress import SILENT, Progress
from compress.recipe import Recipe


@dataclass(frozen=True)
class Proof:
    """What `prove` found. ``comparisons``: with a baseline, a row a
    task, whose verdict counts only where a gate was asked for; ``files``: what it wrote."""

    path: Path
    baseline: str | None = None
    evaluation: Evaluation | None = None
    comparisons: list[Row] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every gate passed; True where there was none."""
        return all(gate.verdict == "passed" for gate in self.gates)


def prove(
    model: str | Path,
    options: EvalOptions | None = None,
    *,
    baseline: str | Path | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    confidence: float = 0.95,
    recipe: str | Path | Recipe | None = None,
    overrides: tuple[str, ...] = (),
    output: str | Path | None = None,
    log_samples: bool = False,
    record: bool = False,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> Proof:
    """Evaluate a model on lm-eval tasks, and check gates on it against a baseline.

    ``model``, ``baseline``: as for `run`. With ``options`` and a baseline the tasks are compared
    document by document, and gated if ``max_drop`` is given. The gates of ``recipe`` are checked as
    well; their baseline is by default what the manifest says the model was made from. ``output``:
    where lm-eval's result files go. ``record``: put the gates' results into the model's manifest.
    An interrupted evaluation continues when it is called again. Raises `BadInput` or `Missing`.
    """
    checkpoint = room.open(room.resolve(str(model), revision, progress))
    claims = recipes.load(recipe, overrides).gates if recipe else ()
    if max_drop is not None and not (baseline and options):
        raise BadInput("a drop is measured against a baseline", mend="give --baseline and --tasks")
    if not options and not claims:
        raise BadInput("nothing to evaluate", mend="give --tasks, or --recipe with gates")
    if record and checkpoint.manifest is None:
        raise BadInput(
            "only a checkpoint made by entropress has a manifest to record gates in",
            where=checkpoint.path,
        )
    reference = _reference(checkpoint, baseline, progress) if baseline or claims else None
    if options:
        load_tasks(options.tasks, options.include_path)
    if reference:
        gates.plan_gates(claims, reference)
    proof = Proof(checkpoint.path, reference.source.id if reference else None)
    journal = cache_dir() / "evaluations" / model_identity(checkpoint)
    if options:
        after = run_tasks(checkpoint, options, journal, progress=progress)
        proof = replace(proof, evaluation=after)
        if output:
            proof.files.extend(save(after, Path(output), log_samples=log_samples))
    if options and baseline and reference:
        before = run_tasks(reference, options, reference_journal(reference), progress=progress)
        drop = 0.0 if max_drop is None else max_drop
        config = LmEvalConfig(
            max_drop=drop, metric=metric, confidence=confidence, **_shared(options)
        )
        judged = gates.judge(before, after, config, reference.source.id)
        proof.comparisons.extend(judged.rows)
        proof.gates.extend([judged] if max_drop is not None else [])
    if reference:
        subject = Subject(reference, checkpoint, journal, progress)
        proof.gates.extend(gates.run_gates(claims, subject))
    if record:
        _record(checkpoint, proof.gates)
    shutil.rmtree(journal, ignore_errors=True)
    return proof


def _reference(
    checkpoint: Checkpoint, baseline: str | Path | None, progress: Progress
) -> Checkpoint:
    """The model to compare with: as given, else what the manifest says this one was made from."""
    if baseline is not None:
        return room.open(room.resolve(str(baseline), None, progress))
    source = (checkpoint.manifest or {}).get("source", {})
    try:
        return room.open(room.resolve(str(source["id"]), source["revision"], progress))
    except (KeyError, EntropressError) as error:
        raise BadInput(
            f"what it was made from is not at hand ({error})",
            where=checkpoint.path,
            mend="give --baseline",
        ) from error


def _shared(options: EvalOptions) -> dict[str, Any]:
    """The options that an `lm_eval` gate has in common with an evaluation."""
    known = LmEvalConfig.model_fields
    return {name: value for name, value in asdict(options).items() if name in known}


def _record(checkpoint: Checkpoint, results: list[GateResult]) -> None:
    """Put gates into the manifest in place of earlier results of the same gate and options."""
    manifest = room.read_manifest(checkpoint.path)
    new = [result.model_dump(mode="json") for result in results]
    asked = [(gate["gate"], gate["config"]) for gate in new]
    kept = [gate for gate in manifest["gates"] if (gate["gate"], gate["config"]) not in asked]
    room.write_manifest(checkpoint.path, {**manifest, "gates": kept + new})
