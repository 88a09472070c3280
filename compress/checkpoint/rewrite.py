"""A checkpoint from a checkpoint, tensor by tensor: bounded memory, resumable, exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint import checkpoint, layout
from compress.checkpoint.atomic import copy_atomic, fsync_dir, room_needed, write_atomic
from compress.checkpoint.checkpoint import Checkpoint, TensorInfo
from compress.checkpoint.json_io import dump_json, load_object
from compress.checkpoint.safetensors_reader import read_header
from compress.checkpoint.safetensors_writer import NewTensor, write_shard
from compress.checkpoint.source import Source
from compress.errors import BadInput
from compress.progress import SILENT, Progress, Step

Transform = Callable[[TensorInfo], Iterable[NewTensor]]
Records = dict[str, dict[str, Any]]


def rewrite(
    source: Checkpoint,
    directory: Path,
    transform: Transform,
    *,
    config: dict[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
    label: str = "writing",
) -> tuple[Checkpoint, Records]:
    """Write ``source`` into ``directory`` with every tensor replaced by those ``transform`` gives.

    One output shard per input shard, under the same name; a shard left without tensors is left
    out. ``transform`` is called for all tensors of a shard before any of its chunks is consumed, so
    it must be lazy. ``config`` and ``metadata`` replace ``config.json`` and every shard's
    ``__metadata__``; None keeps them. Sidecars are copied. Memory: a few chunks.

    Shards that an earlier, interrupted run finished in ``directory`` are kept, and the outcome is
    byte for byte that of a run without interruption. The caller sees to it that input and transform
    are the same: the directory's name is a digest of both.

    Returns the new checkpoint, its ``source`` naming the original, and by new tensor name what
    ``NewTensor.record`` returned. Raises `Missing` when there is no room on disk, and whatever
    reading the source raises; what is unfinished then has no name that counts.
    """
    if directory.resolve() == source.path.resolve():
        raise BadInput("the output is the input", where=directory, mend="choose another directory")
    infos = source.tensor_infos().values()
    records: Records = {}
    with room_needed(directory), progress.step(label, sum(info.nbytes for info in infos)) as step:
        directory.mkdir(parents=True, exist_ok=True)
        for file in source.files:
            inputs = [info for info in infos if info.file == file]
            finished = _journal(directory, file)
            if finished.exists() and (directory / file).exists():
                progress.note(f"{file}: kept from the interrupted run")
                step.advance(sum(info.nbytes for info in inputs))
                records |= load_object(finished)
                continue
            shard_metadata = source.metadata(file) if metadata is None else metadata
            made = _write(directory / file, inputs, transform, shard_metadata, step)
            if (directory / file).exists():
                write_atomic(finished, dump_json(made))
            records |= made
        _complete(source, directory, config)
    return checkpoint.open(Source(directory, source.source.id, source.source.revision)), records


def _journal(directory: Path, file: str) -> Path:
    """Exists when the shard is finished; holds its records until the whole directory is."""
    return directory / f"{file}.done.json"


def _write(
    path: Path,
    inputs: list[TensorInfo],
    transform: Transform,
    metadata: Mapping[str, str] | None,
    step: Step,
) -> Records:
    """Write one shard, unless it has no tensors; advances by decoded bytes of the input."""
    tensors: list[NewTensor] = []
    worth: dict[str, int] = {}  # input bytes that are dealt with once the named tensor is written
    for info in inputs:
        outputs = list(transform(info))
        if outputs:
            worth[outputs[-1].name] = info.nbytes
        else:
            step.advance(info.nbytes)
        tensors += outputs
    if not tensors:
        return {}
    return write_shard(
        path, tensors, metadata, done=lambda tensor: step.advance(worth.get(tensor.name, 0))
    )


def _complete(source: Checkpoint, directory: Path, config: dict[str, Any] | None) -> None:
    """All but the shards; the journals go last, for they are what a resumed run starts from."""
    for sidecar in source.sidecars():
        target = directory / sidecar
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_atomic(source.path / sidecar, target)
    if config is None and load_object(source.path / layout.CONFIG) == source.config:
        copy_atomic(source.path / layout.CONFIG, directory / layout.CONFIG)
    else:
        kept = source.config if config is None else config  # a DFloat11 directory's is another
        write_atomic(directory / layout.CONFIG, dump_json(kept))
    files = [file for file in source.files if (directory / file).exists()]
    if files != [layout.SINGLE]:
        write_atomic(directory / layout.INDEX, dump_json(_index(directory, files)))
    for file in source.files:
        _journal(directory, file).unlink(missing_ok=True)
    fsync_dir(directory)


def _index(directory: Path, files: list[str]) -> dict[str, Any]:
    entries = [
        (file, entry) for file in files for entry in read_header(directory / file).entries.values()
    ]
    return {
        "metadata": {"total_size": sum(entry.nbytes for _, entry in entries)},
        "weight_map": {entry.name: file for file, entry in entries},
    }
