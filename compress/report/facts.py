"""Everything that a report says, collected from a published directory.

What the manifest holds is read as text and numbers of others: a value of a wrong kind is left out,
and a verdict that is not known counts as undecided.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import checkpoint as room
from compress.errors import BadInput
from compress.evaluate import SizeRow, inspect, kind
from compress.hf import count_weights
from compress.progress import SILENT, Progress
from compress.report.exponents import Histogram, TensorExponents, measure_exponents, pool
from compress.report.gates import Gate, overall, read_gates
from compress.report.pruning import Pruning, Removed, merge, read_prunings, together
from compress.report.quantization import Quantization, read_quantization
from compress.report.tokens import TokenPruning, read_token_pruning
from compress.report.values import count, entries, items, members, text

_NUMBERED = re.compile(r"(?:(.+?)\.)?(\d{1,6})\.", re.ASCII)


@dataclass(frozen=True)
class Stage:
    """What was done, in order."""

    name: str
    summary: str


@dataclass(frozen=True)
class Layer:
    """A block that is there, by its number in the original, and the mean entropy in bits of its
    tensors' exponents, by weights."""

    block: int
    bits: float


@dataclass(frozen=True)
class Facts:
    """A report's content. ``name``: of the directory; ``bytes_before``: of the original tensors,
    None where no stage says; ``file_nbytes``: of all files that the manifest vouches for;
    ``layers``: none where a stage has quantized them; ``card``: the text of the model card in the
    directory."""

    name: str
    source: str
    revision: str | None
    lossless: bool
    coded: bool
    architecture: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    stages: list[Stage]
    gates: list[Gate]
    verdict: str
    bytes_before: int | None
    file_nbytes: int
    total: SizeRow
    kinds: list[SizeRow]
    prunings: list[Pruning]
    quantization: Quantization | None
    token_pruning: TokenPruning | None
    layers: list[Layer]
    histogram: Histogram | None
    card: str | None

    @property
    def removed(self) -> Removed:
        """What is gone from which blocks of the original."""
        quantized = self.quantization.dropped if self.quantization else {}
        return merge([together(self.prunings), quantized])


def collect_facts(path: Path, progress: Progress = SILENT) -> Facts:
    """Read a published directory, its tensors once.

    Raises `BadInput` for one without manifest or model, `Corrupt` as opening and reading do.
    """
    checkpoint = room.open(path)
    manifest = checkpoint.manifest
    if manifest is None:
        raise BadInput(
            f"no {room.MANIFEST}: not written by entropress",
            where=path,
            mend="report on a directory that `entropress compress` has written",
        )
    sizes = inspect(path, entropy=False)
    weights = count_weights(checkpoint)
    exponents = [each for each in measure_exponents(checkpoint, progress) if weights[each.name]]
    by_kind: defaultdict[str, list[TensorExponents]] = defaultdict(list)
    for tensor in exponents:
        by_kind[kind(tensor.name)].append(tensor)
    stages = entries(manifest["stages"])
    gates = read_gates(manifest["gates"])
    quantization = read_quantization(stages)
    architectures = items(checkpoint.config.get("architectures"))
    lossless = manifest["class"] == "lossless"
    files = [entry for file, entry in manifest["files"].items() if not room.is_document(file)]
    return Facts(
        name=path.resolve().name,
        source=text(manifest["source"].get("id")) or "unknown model",
        revision=text(manifest["source"].get("revision")) or None,
        lossless=lossless,
        coded=checkpoint.coded,
        architecture=text(architectures[0]) if architectures else "",
        versions={text(name): text(version) for name, version in manifest["versions"].items()},
        recipe=manifest["recipe"],
        stages=[Stage(text(s.get("stage")), text(s.get("summary"))) for s in stages],
        gates=gates,
        verdict=overall(gates),
        bytes_before=_bytes_before(stages) or (sizes.total.nbytes if lossless else None),
        file_nbytes=sum(entry["bytes"] for entry in files),
        total=replace(sizes.total, exponent_bits=_mean_bits(exponents)),
        kinds=[replace(row, exponent_bits=_mean_bits(by_kind[row.group])) for row in sizes.kinds],
        prunings=read_prunings(stages),
        quantization=quantization,
        token_pruning=read_token_pruning(stages),
        layers=[] if quantization else _layers(manifest["tensors"], exponents),
        histogram=pool(exponents),
        card=read_card(path / room.CARD) if room.CARD in checkpoint.sidecars() else None,
    )


def read_card(path: Path) -> str:
    """A model card's text; what is no UTF-8 in it is replaced."""
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _bytes_before(stages: list[dict[str, Any]]) -> int | None:
    return count(members(stages[0].get("metrics")).get("bytes_in")) if stages else None


def _mean_bits(tensors: Iterable[TensorExponents]) -> float | None:
    """The mean entropy over weights; None without any."""
    pairs = [(tensor.weights, tensor.bits) for tensor in tensors]
    weights = sum(weights for weights, _ in pairs)
    return sum(weights * bits for weights, bits in pairs) / weights if weights else None


def _layers(tensors: Mapping[str, Any], exponents: list[TensorExponents]) -> list[Layer]:
    """The blocks of the outermost numbered list of modules that holds most weights."""
    stacks: defaultdict[str, defaultdict[int, list[TensorExponents]]]
    stacks = defaultdict(lambda: defaultdict(list))
    for tensor in exponents:
        original = members(tensors.get(tensor.name)).get("from", tensor.name)
        if match := _NUMBERED.match(original):
            stacks[match[1] or ""][int(match[2])].append(tensor)

    def weights(stack: str) -> int:
        return sum(tensor.weights for block in stacks[stack].values() for tensor in block)

    stack = max(sorted(stacks), key=weights, default=None)
    if stack is None:
        return []
    means = {block: _mean_bits(members) for block, members in sorted(stacks[stack].items())}
    return [Layer(block, bits) for block, bits in means.items() if bits is not None]
