"""Evaluations and gates on a checkpoint that exists, whoever made it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress import checkpoint as room
from compress import gates
from compress import recipe as recipes
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, Corrupt, Missing
from compress.evaluate import (
    EvalOptions,
    Evaluation,
    check_device,
    check_metric,
    load_tasks,
    model_identity,
    reference_journal,
    run_tasks,
    save,
)
from compress.gates import GateResult, LmEvalConfig, Row, Subject
from compress.paths import cache_dir
from compress.progress import SILENT, Progress, no_bars
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


@no_bars()
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
    if log_samples and not output:
        raise BadInput("samples are logged into files", mend="give --output as well")
    if record and max_drop is None and not claims:
        raise BadInput("no gate to record", mend="give --max-drop or --recipe")
    if record and checkpoint.manifest is None:
        raise BadInput(
            "only a checkpoint made by entropress has a manifest to record gates in",
            where=checkpoint.path,
        )
    drop = _drop_gate(options, max_drop, metric, confidence) if options else None
    reference = _reference(checkpoint, baseline, progress) if baseline or claims else None
    identity = model_identity(checkpoint, progress)
    if reference and model_identity(reference, progress) == identity:
        raise BadInput("the baseline is the model itself, bit for bit", where=checkpoint.path)
    if options:
        check_device(options.device)
        check_metric(load_tasks(options.tasks, options.include_path), metric)
    if reference:
        gates.plan_gates(claims, reference)
    proof = Proof(checkpoint.path, reference.source.id if reference else None)
    with _journal(
        identity, [asdict(options) if options else None, [c.name for c in claims]]
    ) as kept:
        after = None
        if options:
            try:
                after = run_tasks(checkpoint, options, kept, progress=progress)
            except (BadInput, Corrupt) as error:
                if max_drop is None or reference is None or drop is None:
                    raise
                proof.gates.append(gates.failed("lm_eval", drop, reference, str(error)))
        if after:
            proof = replace(proof, evaluation=after)
            if output:
                proof.files.extend(save(after, Path(output), log_samples=log_samples))
        if after and options and drop and baseline and reference:
            kept_answers = reference_journal(reference, progress)
            before = run_tasks(reference, options, kept_answers, progress=progress)
            judged = gates.judge(before, after, drop, reference.source.id)
            if max_drop is not None:
                proof.gates.append(judged)
            proof.comparisons.extend(row.model_copy(update={"limit": None}) for row in judged.rows)
        if reference:
            subject = Subject(reference, checkpoint, kept, progress)
            proof.gates.extend(gates.run_gates(claims, subject))
    if record:
        _record(checkpoint, proof.gates)
    return proof


def _drop_gate(
    options: EvalOptions, max_drop: float | None, metric: str | None, confidence: float
) -> LmEvalConfig:
    """The gate on the tasks of an evaluation; without ``max_drop`` only its rows are of use."""
    known = LmEvalConfig.model_fields
    shared = {name: value for name, value in asdict(options).items() if name in known}
    try:
        return LmEvalConfig(
            max_drop=0 if max_drop is None else max_drop,
            metric=metric,
            confidence=confidence,
            **shared,
        )
    except ValidationError as error:
        [fault, *_] = error.errors()
        where = ".".join(map(str, fault["loc"])).replace("_", "-")
        raise BadInput(fault["msg"], where=f"--{where}", got=fault["input"]) from None


def _reference(
    checkpoint: Checkpoint, baseline: str | Path | None, progress: Progress
) -> Checkpoint:
    """The model to compare with: as given, else what the manifest says this one was made from.

    A directory is recorded by its name only, and another of that name may lie here.
    """
    if baseline is not None:
        return room.open(room.resolve(str(baseline), None, progress))
    source = (checkpoint.manifest or {}).get("source", {})
    if not source.get("revision"):
        raise BadInput(
            "what it was made from is not known well enough",
            where=checkpoint.path,
            mend="give --baseline",
        )
    return room.open(room.resolve(str(source["id"]), source["revision"], progress))


@contextmanager
def _journal(identity: str, asked: Any) -> Iterator[Path]:
    """Where a candidate's answers are kept until its evaluation ends, for one process at a time."""
    digest = hashlib.sha256(room.dump_json([asked])).hexdigest()[:16]
    path = cache_dir() / "evaluations" / f"{identity}-{digest}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise Missing(
            f"the cache cannot be written: {error.strerror}",
            where=path.parent,
            mend="set ENTROPRESS_CACHE to a directory that can",
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput("the same evaluation is running already") from None
        yield path
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def _record(checkpoint: Checkpoint, results: list[GateResult]) -> None:
    """Put gates into the manifest in place of earlier results of the very same claim."""
    manifest = room.read_manifest(checkpoint.path)
    new = [result.model_dump(mode="json") for result in results]
    asked = [_claim(gate) for gate in new]
    kept = [gate for gate in manifest["gates"] if _claim(gate) not in asked]
    room.write_manifest(checkpoint.path, {**manifest, "gates": kept + new})


def _claim(gate: dict[str, Any]) -> list[Any]:
    return [gate.get("gate"), gate.get("config"), gate.get("reference")]
