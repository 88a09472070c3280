"""Is a checkpoint what was written, to the bit; and is it what the original was?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import checkpoint as room
from compress.checkpoint import Checkpoint, Digest, TensorInfo
from compress.errors import BadInput, Corrupt, EntropressError
from compress.progress import SILENT, Progress, Step


@dataclass(frozen=True)
class VerifyReport:
    """The outcome of `verify`. ``faults``: one line each, naming file and tensor; empty if sound.

    ``nbytes``: decoded bytes of the ``tensors`` tensors that were read. Compared with an original:
    ``dropped`` are its tensors that a stage removed, by their names in it; ``not_compared`` those
    here whose dtype or values a stage changed, so that nothing can be said of their bytes.
    """

    path: Path
    kind: str | None
    tensors: int = 0
    nbytes: int = 0
    files: int = 0
    against: str | None = None
    faults: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Check every byte of a checkpoint against its manifest, and optionally against the original.

    From the files alone: the manifest's own digest, the exact set of files, the sha256 of each, and
    of each tensor its block checksums, dtype, shape and the sha256 of its decoded bytes. With
    ``against`` (as MODEL of `run`, at ``revision``): each tensor's bytes are the original's, and so
    are the sidecar files; no tensor is missing but those that the manifest says were removed; a
    lossless checkpoint has the same dtypes and config. All faults are collected. Raises `BadInput`
    for a path that is no directory or an original that cannot be opened.
    """
    path = Path(path)
    if not path.is_dir():
        raise BadInput("no such directory", where=path)
    original = None
    if against is not None:
        original = room.open(room.resolve(str(against), revision, progress))
    try:
        manifest = room.read_manifest(path)
    except Corrupt as error:
        return VerifyReport(path, None, faults=[str(error)])
    kind = manifest["class"]
    faults: list[str] = []
    try:
        faults += room.check_files(path, manifest, progress)
        checkpoint = room.open(path)
        infos = checkpoint.tensor_infos()
    except EntropressError as error:  # broken headers leave no tensors to look at
        return VerifyReport(path, kind, faults=[*faults, str(error)])
    records = manifest["tensors"]
    faults += [f"{name}: in the manifest but in no shard" for name in records.keys() - infos.keys()]
    faults += [_at(infos[name], "not in the manifest") for name in infos.keys() - records.keys()]
    known = [info for name, info in infos.items() if name in records]
    nbytes = sum(info.nbytes for info in known)
    with progress.step("verifying tensors", nbytes) as step:
        faults += _collect(known, lambda info: _tensor_fault(checkpoint, info, records, step))
    report = VerifyReport(
        path,
        kind,
        tensors=len(known),
        nbytes=nbytes,
        files=len(manifest["files"]),
        against=None if original is None else original.source.id,
        faults=faults,
    )
    if original is not None:
        _compare(original, checkpoint, manifest, report, progress)
    return report


def _tensor_fault(
    checkpoint: Checkpoint, info: TensorInfo, records: dict[str, Any], step: Step
) -> str | None:
    """What is wrong with one tensor on its own, if anything."""
    record = records[info.name]
    if (record["dtype"], record["shape"]) != (info.dtype, list(info.shape)):
        return _at(info, f"is {info.dtype}{list(info.shape)}, the manifest says otherwise")
    if _sha256(checkpoint, info.name, step) != record["sha256"]:
        return _at(info, "has another sha256 than the manifest")
    return None


def _compare(
    original: Checkpoint,
    checkpoint: Checkpoint,
    manifest: dict[str, Any],
    report: VerifyReport,
    progress: Progress,
) -> None:
    """Add to the report how the checkpoint differs from its original."""
    lossless = manifest["class"] == "lossless"
    records = manifest["tensors"]
    origins = {record.get("from", name): name for name, record in records.items()}
    infos = original.tensor_infos()
    missing, removed = infos.keys() - origins.keys(), _listed(manifest, "removed")
    report.dropped.extend(sorted(missing & removed))
    report.faults.extend(
        f"{name}: in the original but not here" for name in sorted(missing - removed)
    )
    report.faults.extend(
        f"{name}: the manifest says it was removed, but it is here or never was"
        for name in sorted(removed - missing)
    )
    if lossless and room.dense_config(checkpoint.config) != room.dense_config(original.config):
        report.faults.append(f"{room.CONFIG}: differs from the original's")
    report.faults.extend(
        f"{origins[name]}: the original has no {name}"
        for name in sorted(origins.keys() - infos.keys())
    )
    common = [info for name, info in infos.items() if name in origins]
    changed = _listed(manifest, "changed")

    def fault(info: TensorInfo) -> str | None:
        name = origins[info.name]
        record = records[name]
        if not lossless and info.name in changed:  # quantized, it may be several tensors
            report.not_compared.extend(n for n in records if records[n].get("from", n) == info.name)
            return None
        same = record["shape"] == list(info.shape)
        if same and not lossless and record["dtype"] != info.dtype:
            report.not_compared.append(name)
            return None
        same = same and record["dtype"] == info.dtype
        same = same and record["sha256"] == _sha256(original, info.name, step)
        return None if same else f"{name}: differs from the original's {info.name}"

    with progress.step("comparing tensors", sum(info.nbytes for info in common)) as step:
        report.faults.extend(_collect(common, fault))
    report.not_compared.sort()
    report.faults.extend(_sidecar_faults(original, manifest))


def _listed(manifest: dict[str, Any], member: str) -> set[str]:
    """The original's tensors that some stage says it ``removed`` or ``changed``."""
    lists = [stage.get(member) for stage in manifest["stages"] if isinstance(stage, dict)]
    return {str(name) for names in lists if isinstance(names, list) for name in names}


def _sidecar_faults(original: Checkpoint, manifest: dict[str, Any]) -> list[str]:
    faults = []
    for sidecar in filter(lambda path: not room.is_document(path), original.sidecars()):
        entry = manifest["files"].get(sidecar)
        digest = hashlib.sha256((original.path / sidecar).read_bytes()).hexdigest()
        if entry is None:
            faults.append(f"{sidecar}: in the original but not here")
        elif entry["sha256"] != digest:
            faults.append(f"{sidecar}: differs from the original's")
    return faults


def _collect(infos: Iterable[TensorInfo], check: Callable[[TensorInfo], str | None]) -> list[str]:
    """The faults of all tensors in order; two at a time, so that one hashes as another decodes."""

    def guarded(info: TensorInfo) -> str | None:
        try:
            return check(info)
        except Corrupt as error:
            return str(error)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return [fault for fault in pool.map(guarded, infos) if fault]


def _sha256(checkpoint: Checkpoint, name: str, step: Step) -> str:
    digest = Digest(checkpoint.chunks(name))
    for chunk in digest:
        step.advance(memoryview(chunk).nbytes)
    return digest.hexdigest()


def _at(info: TensorInfo, fault: str) -> str:
    return f"{info.file}: {info.name}: {fault}"
