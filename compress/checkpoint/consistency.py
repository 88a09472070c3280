"""What the files of a checkpoint must agree on before any tensor of it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compress import codec
from compress.checkpoint import layout
from compress.checkpoint.manifest import newer_reader_needed
from compress.checkpoint.safetensors_reader import Header, tensor_at
from compress.errors import Corrupt

QUANT_METHOD = "entropress"
_MARK = "quantization_config"


def names_sha256(names: Iterable[str]) -> str:
    """``names_sha256`` of docs/FORMAT.md: of the sorted names, each followed by a line feed."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()


def coding(config: dict[str, Any]) -> dict[str, Any] | None:
    """The config's ``quantization_config`` if it is ours."""
    ours = config.get(_MARK)
    return ours if isinstance(ours, dict) and ours.get("quant_method") == QUANT_METHOD else None


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it was before it was coded; a ``quantization_config`` left is another's.

    One that is null, as some tools write it, says nothing and goes too.
    """
    ours = coding(config)
    quantized = config.get(_MARK) if ours is None else ours.get(_MARK)
    return {
        **{key: value for key, value in config.items() if key != _MARK},
        **({_MARK: quantized} if quantized else {}),
    }


def check_index(path: Path, headers: dict[str, Header], weight_map: dict[str, str] | None) -> None:
    """Every tensor once, and where there is an index, where it says."""
    home: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.entries:
            if name in home:
                raise Corrupt(f"is also in {home[name]}", where=tensor_at(path / file, name))
            home[name] = file
            if weight_map is not None and name not in weight_map:
                raise Corrupt("is not in the index", where=tensor_at(path / file, name))
    for name, file in (weight_map or {}).items():
        if home.get(name) != file:
            raise Corrupt(f"is not in {file}", where=tensor_at(path / layout.INDEX, name))


def check_coding(path: Path, headers: dict[str, Header], config: dict[str, Any]) -> None:
    """Shards and config agree on being coded, and the names are the ones that were written."""
    ours = coding(config)
    for file, header in headers.items():
        if (QUANT_METHOD in (header.metadata or {})) != (ours is not None):
            raise Corrupt(
                f"shard and {layout.CONFIG} disagree on whether the tensors are coded",
                where=path / file,
            )
    if ours is None:
        return
    where = path / layout.CONFIG
    needed = ours.get("min_reader")
    if type(needed) is not int:
        raise Corrupt(f"{_MARK} lacks min_reader", where=where)
    if needed > codec.FORMAT_VERSION:
        raise newer_reader_needed(where, needed)
    names = [name for header in headers.values() for name in header.entries]
    if ours.get("tensors") != len(names) or ours.get("names_sha256") != names_sha256(names):
        raise Corrupt("the shards do not hold the tensors that were written", where=where)
