"""A streaming writer of safetensors files: no tensor's size need be known before it has passed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.atomic import atomic_file
from compress.checkpoint.safetensors_reader import tensor_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

_WORTH_A_THREAD = 1 << 20

# Offsets and unknown lengths are below this many bytes, so its digits bound theirs.
_WIDEST = 10**15


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written.

    ``chunks``: consecutive pieces of its little-endian bytes, consumed once, when its turn comes.
    ``shape`` None: 1-D ``U8`` of as many elements as bytes arrive.
    ``record``: called after the chunks are consumed; its JSON-able result is kept by the writer.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    chunks: Iterable[Buffer]
    record: Callable[[], dict[str, Any]] | None = None


class Digest:
    """Chunks on their way, and the SHA-256 of all that passed.

    Where chunks are large, the next one is got and hashed in another thread while the consumer
    works on the last; reading, decoding and hashing all free the GIL.
    """

    def __init__(self, chunks: Iterable[Buffer]) -> None:
        self._chunks = chunks
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[Buffer]:
        remaining = iter(self._chunks)
        chunk = self._next(remaining)
        if chunk is None or memoryview(chunk).nbytes < _WORTH_A_THREAD:
            while chunk is not None:
                yield chunk
                chunk = self._next(remaining)
            return
        with ThreadPoolExecutor(1) as ahead:
            while chunk is not None:
                following = ahead.submit(self._next, remaining)
                yield chunk
                chunk = following.result()

    def _next(self, remaining: Iterator[Buffer]) -> Buffer | None:
        chunk = next(remaining, None)
        if chunk is not None:
            self._hash.update(chunk)
        return chunk

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_shard(
    path: Path,
    tensors: Sequence[NewTensor],
    metadata: Mapping[str, str] | None = None,
    done: Callable[[NewTensor], None] = lambda tensor: None,
) -> dict[str, dict[str, Any]]:
    """Write one safetensors file atomically, tensors in the order given; return their records.

    The header comes first in the file but is known last: room for the longest it can be is left,
    and what remains is padded with spaces. ``done`` is called as each tensor has been written.
    Raises `Missing` when there is no room on disk, `ValueError` for two tensors of one name or
    bytes that do not match dtype and shape.
    """
    room = _header_room(tensors, metadata)
    layout: dict[str, dict[str, Any]] = {}
    records: dict[str, dict[str, Any]] = {}
    with atomic_file(path) as file:
        file.write(b" " * room)
        position = 0
        for tensor in tensors:
            start = position
            for chunk in tensor.chunks:
                position += file.write(chunk)
            shape = (position - start,) if tensor.shape is None else tensor.shape
            if tensor_bytes(tensor.dtype, shape, tensor.name) != position - start:
                raise ValueError(f"{tensor.name}: {position - start} bytes for shape {shape}")
            layout[tensor.name] = _entry(tensor.dtype, shape, start, position)
            if tensor.record is not None:
                records[tensor.name] = tensor.record()
            done(tensor)
        file.seek(0)
        file.write((room - 8).to_bytes(8, "little") + _header(layout, metadata).ljust(room - 8))
    return records


def _header_room(tensors: Sequence[NewTensor], metadata: Mapping[str, str] | None) -> int:
    """Bytes before the first tensor: enough whatever the offsets, and a multiple of eight."""
    widest = {
        tensor.name: _entry(tensor.dtype, tensor.shape or (_WIDEST,), _WIDEST, _WIDEST)
        for tensor in tensors
    }
    if len(widest) < len(tensors):
        raise ValueError("two tensors of one name in a shard")
    return -(-(8 + len(_header(widest, metadata))) // 8) * 8


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _header(layout: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    document = ({} if metadata is None else {"__metadata__": dict(metadata)}) | dict(layout)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
