"""A strict reader of safetensors files that trusts nothing and holds one chunk at a time.

Layout: a 64-bit little-endian length, that many bytes of JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import codec
from compress.checkpoint.json_io import parse_json
from compress.errors import BadInput, Corrupt

MAX_HEADER = 100_000_000  # the official reader's limit, in bytes
_MAX_ELEMENTS = (1 << 63) - 1


@dataclass(frozen=True)
class Entry:
    """One stored tensor: ``start`` is its absolute offset in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """``entries`` in the order of their offsets; ``metadata`` is ``__metadata__``, if any."""

    entries: dict[str, Entry]
    metadata: dict[str, str] | None
    sha256: str


def tensor_at(path: object, name: str) -> str:
    """How messages name a tensor in a file; names are hostile text, so escaped and shortened."""
    return f"{path}: tensor {name[:200]!r}"


def read_header(path: Path) -> Header:
    """The checked header of a file; allocates no more than the file's own size.

    Raises `Corrupt` naming file and tensor: a length, dtype, shape or offset that cannot be,
    tensors that overlap, leave gaps or do not cover the file; `BadInput` for an unreadable file.
    """
    raw, data_bytes = _raw_header(path)
    document = parse_json(raw, path)
    if not isinstance(document, dict) or raw[:1] != b"{":
        raise Corrupt("the safetensors header is not a JSON object", where=path)
    metadata = document.pop("__metadata__", None)
    if metadata is not None and not _is_text_map(metadata):
        raise Corrupt("__metadata__ is not a map from text to text", where=path)
    data_start = 8 + len(raw)
    entries = [_entry(path, name, value, data_bytes) for name, value in document.items()]
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    position = 0
    for entry in entries:
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "follows a gap"
            raise Corrupt(fault, where=tensor_at(path, entry.name))
        position += entry.nbytes
    if position != data_bytes:
        raise Corrupt("bytes after the last tensor", where=path, got=data_bytes - position)
    return Header(
        {e.name: Entry(e.name, e.dtype, e.shape, data_start + e.start, e.nbytes) for e in entries},
        metadata,
        hashlib.sha256(raw).hexdigest(),
    )


def read_pieces(path: Path, start: int, nbytes: int, size: int) -> Iterator[memoryview]:
    """``nbytes`` of a file from ``start`` on, in pieces of ``size`` bytes, the last one shorter."""
    import numpy as np

    with path.open("rb") as file:
        file.seek(start)
        while nbytes:
            # numpy asks for huge pages, which halves the time of reading from the page cache.
            piece = np.empty(min(size, nbytes), np.uint8).data
            if file.readinto(piece) != len(piece):
                raise Corrupt("the file became shorter while it was read", where=path)
            nbytes -= len(piece)
            yield piece


def read_into(path: Path, start: int, buffer: memoryview) -> None:
    """Fill a writable buffer from ``start`` on."""
    with path.open("rb") as file:
        file.seek(start)
        if file.readinto(buffer) != len(buffer):
            raise Corrupt("the file became shorter while it was read", where=path)


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON and the number of bytes that follow it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise Corrupt(
                    "header length exceeds the file or the limit of 100 MB",
                    where=path,
                    got=f"{length} bytes in a file of {size}",
                )
            return file.read(length), size - 8 - length
    except FileNotFoundError:
        raise Corrupt("the shard is missing", where=path) from None
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=path) from None


def _entry(path: Path, name: str, value: Any, data_bytes: int) -> Entry:
    """One checked header entry, its start still relative to the data."""
    where = tensor_at(path, name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise Corrupt("needs dtype, shape and data_offsets, nothing else", where=where)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise Corrupt(
            "shape and data_offsets must be lists of integers, none negative", where=where
        )
    start, end = offsets
    if start > end or end > data_bytes:
        raise Corrupt(
            "offsets run past the end of the file" if start <= end else "offsets run backwards",
            where=where,
            got=f"{start} to {end}",
            expected=f"at most {data_bytes}",
        )
    nbytes = tensor_bytes(dtype, shape, where)
    if nbytes != end - start:
        raise Corrupt(
            f"size disagrees with dtype {dtype} and shape",
            where=where,
            got=f"{end - start} bytes",
            expected=nbytes,
        )
    return Entry(name, dtype, tuple(shape), start, nbytes)


def tensor_bytes(dtype: Any, shape: list[int] | tuple[int, ...], where: object) -> int:
    """Size of a tensor; `Corrupt` for an unknown dtype, an absurd shape or a part of a byte."""
    elements = 1
    for length in shape:
        elements *= length
        if max(elements, length) > _MAX_ELEMENTS:
            raise Corrupt("the shape has too many elements", where=where)
    if not isinstance(dtype, str) or len(dtype) > 16:  # a name that long is not worth comparing
        raise Corrupt("unknown dtype", where=where)
    try:
        bits = elements * codec.dtype_bits(dtype)
    except BadInput as error:
        raise Corrupt(str(error), where=where) from None
    if bits % 8:
        raise Corrupt(f"{elements} elements of {dtype} do not fill whole bytes", where=where)
    return bits // 8


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
