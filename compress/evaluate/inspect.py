"""What is in a checkpoint: sizes, bits per weight and exponent entropy, by dtype and by kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import checkpoint as room
from compress.checkpoint import Checkpoint, TensorInfo
from compress.hf import count_weights
from compress.progress import SILENT, Progress
from compress.signals import measure_weights


@dataclass(frozen=True)
class SizeRow:
    """A group of tensors. ``exponent_bits``: entropy of its exponents in bits, None if unknown.

    ``weights``: as `compress.hf.count_weights`; what is stored of scales counts, they do not.
    """

    group: str
    tensors: int
    weights: int
    nbytes: int
    stored_nbytes: int
    exponent_bits: float | None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, all overhead inside the tensors included; 0 of a group without weights."""
        return 8 * self.stored_nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Inspection:
    """The outcome of `inspect`. ``file_nbytes`` counts every file that belongs to the model."""

    path: Path
    coded: bool
    file_nbytes: int
    total: SizeRow
    dtypes: list[SizeRow]
    kinds: list[SizeRow]
    manifest: dict[str, Any] | None


def inspect(
    model: str | Path,
    *,
    revision: str | None = None,
    entropy: bool = True,
    progress: Progress = SILENT,
) -> Inspection:
    """Measure a checkpoint, compressed or not; ``model`` as for `run`.

    ``entropy`` reads every tensor to find the entropy of its exponents: the order-0 Shannon entropy
    of each tensor, averaged over weights. Raises `BadInput` and `Corrupt` as opening does.
    """
    checkpoint = room.open(room.resolve(str(model), revision, progress))
    infos = list(checkpoint.tensor_infos().values())
    bits: dict[str, float] = {}
    if entropy:
        found = measure_weights(checkpoint, progress)
        bits = {tensor.name: tensor.bits for tensor in found if tensor.symbol == "exponent"}
    weights = count_weights(checkpoint)
    manifest = checkpoint.manifest
    return Inspection(
        path=checkpoint.path,
        coded=checkpoint.coded,
        file_nbytes=_file_nbytes(checkpoint),
        total=_row("all", infos, weights, bits),
        dtypes=_group(infos, weights, bits, lambda info: info.dtype),
        kinds=_group(infos, weights, bits, lambda info: kind(info.name)),
        manifest=manifest
        and {
            key: manifest[key]
            for key in ("class", "source", "recipe", "versions", "stages", "gates")
        },
    )


def kind(name: str) -> str:
    """A tensor's role: the last two parts of its module's name, without layer or expert numbers."""
    module, _, _ = name.rpartition(".")
    return ".".join([part for part in module.split(".") if not part.isdigit()][-2:]) or name


def _group(
    infos: Iterable[TensorInfo],
    weights: dict[str, int],
    bits: dict[str, float],
    key: Callable[[TensorInfo], str],
) -> list[SizeRow]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for info in infos:
        groups[key(info)].append(info)
    rows = [_row(group, members, weights, bits) for group, members in groups.items()]
    return sorted(rows, key=lambda row: (-row.nbytes, row.group))


def _row(
    group: str, infos: list[TensorInfo], weights: dict[str, int], bits: dict[str, float]
) -> SizeRow:
    measured = sum(weights[info.name] for info in infos if info.name in bits)
    total = sum(weights[info.name] * bits[info.name] for info in infos if info.name in bits)
    return SizeRow(
        group,
        tensors=len(infos),
        weights=sum(weights[info.name] for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        stored_nbytes=sum(info.stored_nbytes for info in infos),
        exponent_bits=total / measured if measured else None,
    )


def _file_nbytes(checkpoint: Checkpoint) -> int:
    files = [*checkpoint.files, *checkpoint.sidecars(), room.CONFIG, room.INDEX, room.MANIFEST]
    paths = [checkpoint.path / file for file in files]
    return sum(path.stat().st_size for path in paths if path.is_file())
