"""A recipe's stages and gates in order: plan, run, journal, resume, check, publish."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from compress import __version__, codec, gates, prune, signals, stages
from compress import checkpoint as room
from compress import recipe as recipes
from compress.checkpoint import Checkpoint, Digest, Source
from compress.errors import BadInput
from compress.gates import GateResult, Subject
from compress.progress import SILENT, Progress, no_bars
from compress.recipe import Recipe, StageSpec
from compress.signals import Measurement
from compress.stages import (
    Calibration,
    CheckpointView,
    StageReport,
    Workspace,
    encode_weights,
    total_nbytes,
)
from compress.workspace import (
    RunDirectory,
    absolute,
    check_output,
    check_room,
    open_workspace,
    stage_key,
)

Granularity = Literal["block", "attention", "mlp"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True)
class StagePlan:
    """What one stage is expected to do. ``nbytes``: size of all tensors after it."""

    stage: str
    nbytes: int
    changes: list[str]


@dataclass(frozen=True)
class Plan:
    """What a run would do, found without writing. Sizes are those of all tensors, in bytes."""

    source: str
    recipe: dict[str, Any]
    bytes_in: int
    bytes_out: int
    stages: list[StagePlan]


@dataclass(frozen=True)
class Result:
    """What a run left behind. Sizes are those of all tensors as stored, in bytes."""

    path: Path
    manifest: dict[str, Any]
    bytes_in: int
    bytes_out: int
    gates: list[GateResult]

    @property
    def passed(self) -> bool:
        """Whether every gate of the recipe did; True where it has none."""
        return all(gate.verdict == "passed" for gate in self.gates)


def plan(
    recipe: str | Path | Recipe,
    model: str | Path,
    *,
    overrides: Iterable[str] = (),
    revision: str | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Say what `run` would do and how large its output would be.

    Each stage is planned on what the one before will make where that is known without writing (a
    cast), otherwise on the model before it, scaled. Raises as `run` does before it writes.
    """
    chosen = recipes.load(recipe, overrides)
    checkpoint = room.open(room.resolve(str(model), revision, progress))
    planned = _plan(chosen, checkpoint)
    gates.plan_gates(chosen.gates, checkpoint)
    return planned


@no_bars()
def run(
    recipe: str | Path | Recipe,
    model: str | Path,
    output_dir: str | Path,
    *,
    overrides: Iterable[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Run a recipe on a model and publish the outcome as ``output_dir``, whole or not at all.

    ``model``: a directory, a hub id, or ``demo:NAME``. ``resume`` continues an interrupted run on
    the same input and recipe, and gives the bytes it would have given; ``overwrite`` starts again
    and replaces an existing checkpoint. Everything is checked and planned before the first byte is
    written. The gates are checked before the outcome gets its name; it gets it whatever they say,
    and their results stand in its manifest. Raises `BadInput`, `Missing` or `Corrupt`.
    """
    chosen = recipes.load(recipe, overrides)
    output = absolute(output_dir)
    check_output(output, resume=resume, overwrite=overwrite)
    source = room.resolve(str(model), revision, progress)
    checkpoint = room.open(source)
    check_output(output, source.path, resume=resume, overwrite=overwrite)
    planned = _plan(chosen, checkpoint, exact=False)
    gates.plan_gates(chosen.gates, checkpoint)
    sizes = [stage.nbytes for stage in planned.stages]
    with open_workspace(output, overwrite=overwrite) as directory:
        if directory.published(_keys(chosen, checkpoint)[-1], _claims(chosen)):
            manifest = room.read_manifest(output)
        else:
            most = max(size + before for size, before in zip(sizes, [0, *sizes], strict=False))
            check_room(output.parent, most, directory.path)
            manifest = _run(chosen, checkpoint, directory, threads, progress)
        directory.remove()
    found = [GateResult.model_validate(gate) for gate in manifest["gates"]]
    return Result(output, manifest, planned.bytes_in, _stored_nbytes(room.open(output)), found)


def decompress(
    model: str | Path,
    output_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Write the dense checkpoint that a compressed one stands for, whole or not at all.

    Every tensor is checked against the sha256 in the manifest. The outcome is an ordinary
    checkpoint without manifest. Raises `BadInput`, `Missing` or `Corrupt`.
    """
    output = absolute(output_dir)
    coded = room.open(model)
    check_output(output, coded.path, resume=resume, overwrite=overwrite)
    if not coded.coded:
        raise BadInput("is not compressed by entropress", where=coded.path)
    needed = sum(info.nbytes for info in coded.tensor_infos().values())
    with open_workspace(output, overwrite=overwrite) as directory:
        key = stage_key(0, "decode", coded.fingerprint, __version__)
        if not directory.published(key):
            check_room(output.parent, needed, directory.path)
            directory.keep_only([key])
            encode_weights.decode(coded, directory.stage(key), progress)
            directory.publish(key)
        directory.remove()
    return output


@no_bars()
def measure(
    model: str | Path,
    calibration: Calibration | None = None,
    *,
    scorers: Sequence[str] = signals.SCORERS_DEFAULT,
    drop: int = 1,
    granularity: Granularity = "block",
    revision: str | None = None,
    progress: Progress = SILENT,
) -> Measurement:
    """Score the blocks of a model, compressed or not, by ``scorers``; ``model`` as for `run`.

    ``granularity``: whether whole blocks or the attention or MLP of each. ``drop``: how many the
    stability of the choice is about. Raises `BadInput` for a model without tokenizer, blocks or
    parts that are known, a scorer that is not known, or a text too short.
    """
    if granularity not in GRANULARITIES:
        raise BadInput("no such granularity", got=granularity, expected=", ".join(GRANULARITIES))
    checkpoint = room.open(room.resolve(str(model), revision, progress))
    return signals.measure(
        checkpoint,
        calibration or Calibration(),
        progress,
        scorers=scorers,
        drop=drop,
        granularity=granularity,
        parts=None
        if granularity == "block"
        else lambda model: prune.sublayer_parts(model, prune.find_sublayers(model), granularity),
    )


def _plan(recipe: Recipe, checkpoint: Checkpoint, exact: bool = True) -> Plan:
    current: CheckpointView = checkpoint
    if not recipe.stages:
        raise BadInput("the recipe has gates but no stage", where=recipe.name, mend="use `eval`")
    before = size = total_nbytes(checkpoint)
    planned = []
    for spec in _specs(recipe):
        estimate = stages.get(spec.name).plan(current, spec.config, recipe.calibration, exact)
        size = round(size * estimate.nbytes / max(1, total_nbytes(current)))
        planned.append(StagePlan(spec.name, size, estimate.changes))
        current = estimate.outcome or current
    return Plan(checkpoint.source.id, recipe.resolved(), before, size, planned)


def _run(
    recipe: Recipe,
    checkpoint: Checkpoint,
    directory: RunDirectory,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Run what is not finished yet, seal the outcome and publish it; returns the manifest."""
    specs, keys = _specs(recipe), _keys(recipe, checkpoint)
    directory.keep_only(keys)
    done = max((i for i, key in enumerate(keys, 1) if directory.finished(key)), default=0)
    reports = [StageReport.model_validate(directory.report(key)) for key in keys[:done]]
    source, current = checkpoint.source, checkpoint
    if done:
        progress.note(f"resumed after {specs[done - 1].name}")
        current = room.open(Source(directory.stage(keys[done - 1]), source.id, source.revision))
    for index in range(done, len(specs)):
        spec, key = specs[index], keys[index]
        directory.begin(key)
        workspace = Workspace(
            directory.stage(key), recipe.calibration, progress, threads, directory.scratch(key)
        )
        current, report = stages.get(spec.name).run(current, spec.config, workspace)
        directory.finish(key, report.model_dump(mode="json"))
        reports.append(report)
        if index:
            directory.drop(keys[index - 1])
    directory.sweep(keys[-1])
    document = _manifest(recipe, current, reports, progress)
    manifest = room.write_manifest(current.path, document)
    if recipe.gates:
        subject = Subject(checkpoint, current, directory.answers(keys[-1]), progress)
        document["gates"] = _dumped(gates.run_gates(recipe.gates, subject))
        manifest = room.write_manifest(current.path, document)
    directory.publish(keys[-1], _claims(recipe))
    return manifest


def _claims(recipe: Recipe) -> list[Any]:
    """What the gates of a recipe say, as plain data."""
    return [[spec.name, spec.config.model_dump(mode="json")] for spec in recipe.gates]


def _dumped(results: Iterable[GateResult]) -> list[dict[str, Any]]:
    return [result.model_dump(mode="json") for result in results]


def _recorded(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without a path of this machine, be the file there or not."""
    resolved = recipe.resolved()
    if not resolved["calibration"]["data"].startswith("builtin:"):
        resolved["calibration"]["data"] = Path(resolved["calibration"]["data"]).name
    resolved["stages"] = [{spec.name: gates.recorded(spec.config)} for spec in recipe.stages]
    resolved["gates"] = [{spec.name: gates.recorded(spec.config)} for spec in recipe.gates]
    return resolved


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"id": checkpoint.source.id, "revision": checkpoint.source.revision}


def _stored_nbytes(checkpoint: Checkpoint) -> int:
    return sum(info.stored_nbytes for info in checkpoint.tensor_infos().values())


def _specs(recipe: Recipe) -> list[StageSpec]:
    """The recipe's stages, led by a cast if it takes the model in in another dtype."""
    if recipe.model.dtype == "auto":
        return list(recipe.stages)
    config = stages.get("cast").Config.model_validate({"dtype": recipe.model.dtype})
    return [StageSpec("cast", config), *recipe.stages]


def _keys(recipe: Recipe, checkpoint: Checkpoint) -> list[str]:
    """For each stage a digest of all that decides its output: the model and the options so far."""
    version = [__version__, codec.FORMAT_VERSION]
    calibration = recipe.calibration.model_dump(mode="json")
    text = Path(recipe.calibration.data)
    if text.is_file():
        calibration["data"] = hashlib.sha256(text.read_bytes()).hexdigest()
    keys: list[str] = []
    for index, spec in enumerate(_specs(recipe)):
        before = keys[-1] if keys else [checkpoint.fingerprint, calibration, version]
        options = spec.config.model_dump(mode="json")
        inputs = Path(options.get("inputs") or "")
        if inputs.is_file():
            options["inputs"] = hashlib.sha256(inputs.read_bytes()).hexdigest()
        keys.append(stage_key(index, before, spec.name, options))
    return keys


def _manifest(
    recipe: Recipe, outcome: Checkpoint, reports: list[StageReport], progress: Progress
) -> dict[str, Any]:
    """The manifest of a finished directory; holds no time and no path of this machine."""
    lossless = all(stages.get(spec.name).lossless for spec in _specs(recipe))
    return {
        "class": "lossless" if lossless else "near-lossless",
        "source": _origin(outcome),
        "recipe": _recorded(recipe),
        "versions": {"entropress": __version__}
        | {name: metadata.version(name) for name in ("torch", "transformers")},
        "stages": [
            report.model_dump(mode="json", exclude={"tensors", "renamed"})
            | {"removed": [_original(name, reports[:i]) for name in report.removed]}
            | {"changed": [_original(name, reports[: i + 1]) for name in report.changed]}
            for i, report in enumerate(reports)
        ],
        "tensors": _tensor_records(outcome, reports, progress),
        "files": room.hash_files(outcome.path, progress),
        "gates": _dumped(gates.pending(recipe.gates)),
    }


def _tensor_records(
    outcome: Checkpoint, reports: list[StageReport], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Dtype, shape and sha256 of every tensor, and the name it had in the original."""
    records = reports[-1].tensors or _hash_tensors(outcome, progress)
    for name, record in records.items():
        origin = _original(name, reports)
        if origin != name:
            record["from"] = origin
    return records


def _original(name: str, reports: list[StageReport]) -> str:
    """The name that a tensor had before those stages."""
    for report in reversed(reports):
        name = report.renamed.get(name, name)
    return name


def _hash_tensors(outcome: Checkpoint, progress: Progress) -> dict[str, dict[str, Any]]:
    infos = outcome.tensor_infos().values()
    records = {}
    with progress.step("hashing tensors", sum(info.nbytes for info in infos)) as step:
        for info in infos:
            digest = Digest(outcome.chunks(info.name))
            for chunk in digest:
                step.advance(memoryview(chunk).nbytes)
            records[info.name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "sha256": digest.hexdigest(),
            }
    return records
