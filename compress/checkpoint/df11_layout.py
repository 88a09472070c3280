"""What a DFloat11 directory holds: its settings, its units, and the weights that each stands for.

The files name units, not weights: those come from ``pattern_dict``, a map from regular expressions
for units to the modules in them, and their shapes from the architecture in the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.layout import CONFIG, DF11
from compress.checkpoint.loading import model_class
from compress.checkpoint.safetensors_reader import Entry, Header, tensor_at
from compress.codec import df11
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    from torch import nn

CODES = "encoded_exponent"
_DTYPES = {
    CODES: "U8",
    "sign_mantissa": "U8",
    "luts": "U8",
    "gaps": "U8",
    "output_positions": "U8",  # of uint32
    "split_positions": "I64",
}
WHOLE = "download all files of the directory"
_VERSION = re.compile(r"0\.[2-5]\.\d+")
_PATTERN_MAX = 256
_NAME_MAX = 200


@dataclass(frozen=True)
class Stored:
    """Where a unit's parts lie: by part the shard's name and the entry in it."""

    name: str
    parts: dict[str, tuple[str, Entry]]

    @property
    def words(self) -> int:
        """How many weights it holds."""
        return self.parts["sign_mantissa"][1].nbytes

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.parts.values())


@dataclass(frozen=True)
class Weight:
    """One weight of a unit: its name, shape, and the index of its first and past its last word."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_patterns(config: dict[str, Any], path: Path) -> dict[re.Pattern[str], list[str]]:
    """The checked ``pattern_dict``; `BadInput` for a version or settings that are not known."""
    where, settings = f"{path / CONFIG}: {DF11}", config[DF11]
    if not isinstance(settings, dict):
        raise Corrupt("is not an object", where=where)
    version = settings.get("version")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise BadInput(
            "unknown version", where=where, got=repr(version)[:40], expected="0.2 to 0.5"
        )
    for key, known in (
        ("threads_per_block", [df11.BLOCK_WINDOWS]),
        ("bytes_per_thread", df11.WINDOW_BYTES),
    ):
        if settings.get(key) != known:
            raise BadInput(
                f"unknown {key}", where=where, got=repr(settings.get(key))[:40], expected=known
            )
    patterns = settings.get("pattern_dict")
    if not isinstance(patterns, dict) or not all(
        isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        for paths in patterns.values()
    ):
        raise Corrupt("pattern_dict must map text to lists of text", where=where)
    return {_compiled(pattern, where): paths for pattern, paths in patterns.items()}


def _compiled(pattern: str, where: object) -> re.Pattern[str]:
    """A pattern that cannot run for years: no repeated group, few repeats, few choices."""
    bare = re.sub(r"\\.", "x", pattern)
    slow = (
        re.search(r"\)[*+{]|\(\?|\{", bare)
        or len(re.findall(r"[*+?]", bare)) > 3
        or bare.count("(") > 3
    )
    if slow or len(pattern) > _PATTERN_MAX:
        raise BadInput("a pattern too long or too slow", where=where, got=repr(pattern)[:100])
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise Corrupt(f"not a pattern: {error}", where=where, got=repr(pattern)[:100]) from None


def find_units(path: Path, headers: dict[str, Header]) -> dict[str, Stored]:
    """The units of all shards by name; raises `Corrupt` for one that lacks a part."""
    parts: dict[str, dict[str, tuple[str, Entry]]] = {}
    everything = [
        (file, entry) for file, header in headers.items() for entry in header.entries.values()
    ]
    split = {entry.name: entry.name.rpartition(".")[::2] for _, entry in everything}
    units = {unit for unit, part in split.values() if part == CODES}
    for file, entry in everything:
        unit, part = split[entry.name]
        if unit not in units or part not in _DTYPES:
            continue
        where = tensor_at(path / file, entry.name)
        if entry.dtype != _DTYPES[part] or len(entry.shape) != (2 if part == "luts" else 1):
            got = f"{entry.dtype} {list(entry.shape)}"
            raise Corrupt("has the wrong dtype or shape", where=where, got=got)
        parts.setdefault(unit, {})[part] = (file, entry)
    for unit, found in parts.items():
        if missing := [part for part in _DTYPES if part not in found]:
            raise Corrupt(f"the unit has no {missing[0]}", where=tensor_at(path, unit))
        if len(unit) > _NAME_MAX or found["output_positions"][1].nbytes % 4:
            wrong = "a name that long" if len(unit) > _NAME_MAX else "output_positions of odd size"
            raise Corrupt(f"the unit has {wrong}", where=tensor_at(path, unit))
    return {unit: Stored(unit, found) for unit, found in parts.items()}


def find_weights(
    units: Iterable[Stored],
    patterns: dict[re.Pattern[str], list[str]],
    path: Path,
    config: dict[str, Any],
) -> dict[str, list[Weight]]:
    """The weights of each unit in the order of its words.

    Raises `BadInput` where transformers does not know the architecture, or knows it with other
    modules or sizes, and `Corrupt` where a module that is to be a unit has none.
    """
    model = _skeleton(path, config)
    modules = dict(model.named_modules())
    found = {unit.name: _weights(unit, patterns, modules, path) for unit in units}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in modules:
        if name in found or (paths := _paths(name, patterns)) is None:
            continue
        members = _members(name, paths, modules)
        there = all(hasattr(modules.get(member), "weight") for member in members)
        if there and any(f"{member}.weight" not in tied for member in members):
            # These directories have no list of their files.
            raise Corrupt("the unit is missing", where=tensor_at(path, name), mend=WHOLE)
    return found


def _skeleton(path: Path, config: dict[str, Any]) -> nn.Module:
    """The model of a config without memory for its weights."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not isinstance(config.get("model_type"), str):
        raise BadInput(
            f"a DFloat11 model whose {CONFIG} names no architecture of transformers (diffusion "
            "models have none), so the shapes of its weights are not known",
            where=path,
            mend=f"add {DF11} to the {CONFIG} of the model it was made from and put that one here",
        )
    try:
        settings = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return model_class(config)._from_config(settings)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())
        raise BadInput(
            f"transformers cannot build the architecture of this DFloat11 model: {reason}",
            where=path / CONFIG,
        ) from error


def _paths(name: str, patterns: dict[re.Pattern[str], list[str]]) -> list[str] | None:
    """What the first pattern that fits a unit's name says of it."""
    return next((paths for pattern, paths in patterns.items() if pattern.fullmatch(name)), None)


def _members(name: str, paths: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The modules whose weights a unit of that name holds."""
    from torch import nn

    alone = isinstance(modules.get(name), (nn.Linear, nn.Embedding))
    return [name] if alone else [f"{name}.{path}" for path in paths]


def _weights(
    unit: Stored,
    patterns: dict[re.Pattern[str], list[str]],
    modules: dict[str, nn.Module],
    path: Path,
) -> list[Weight]:
    where = tensor_at(path, unit.name)
    if (paths := _paths(unit.name, patterns)) is None:
        raise Corrupt("no pattern of pattern_dict fits the unit", where=where)
    weights: list[Weight] = []
    end = 0
    for name in _members(unit.name, paths, modules):
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise BadInput(
                "this version of transformers has no such module in the architecture",
                where=where,
                got=repr(name)[:200],
                mend="install the version that the model was made with",
            )
        start, end = end, end + math.prod(weight.shape)
        weights.append(Weight(f"{name}.weight", tuple(weight.shape), start, end))
    if not weights or end != unit.words:
        raise BadInput(
            f"holds other weights than the architecture in {CONFIG} has",
            where=where,
            got=f"{unit.words} of them",
            expected=end,
        )
    return weights
