"""A model directory, read-only: its config, and its tensors one chunk at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import codec
from compress.checkpoint import layout, loading
from compress.checkpoint.consistency import check_coding, check_index, coding
from compress.checkpoint.json_io import load_object
from compress.checkpoint.manifest import read_manifest
from compress.checkpoint.safetensors_reader import (
    Entry,
    Header,
    read_header,
    read_into,
    read_pieces,
    tensor_at,
)
from compress.checkpoint.source import Source
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

CHUNK = 1 << 24


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its user sees it: ``dtype``, ``shape``, ``nbytes`` are those of the decoded one.

    ``dtype`` as safetensors spells it; ``file``: the shard's name; ``stored_nbytes``: size in it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    coded: bool
    stored_nbytes: int


def open(model: Path | str | Source) -> Checkpoint:
    """Open a model directory: headers, index and config are read and checked, no tensor is.

    Raises `BadInput` for a directory that holds no safetensors model, `Corrupt` for one whose files
    contradict themselves or each other.
    """
    if not isinstance(model, Source):
        model = Source(Path(model), Path(model).absolute().name)
    files, weight_map = layout.find_shards(model.path)
    config = load_object(model.path / layout.CONFIG)
    headers = {file: read_header(model.path / file) for file in files}
    check_index(model.path, headers, weight_map)
    check_coding(model.path, headers, config)
    if layout.DF11 in config:
        from compress.checkpoint.df11 import DF11Checkpoint  # which is a Checkpoint itself

        return DF11Checkpoint(model, config, headers)
    return Checkpoint(model, config, headers)


class Checkpoint:
    """A checked model directory. Get one from `open`."""

    def __init__(self, source: Source, config: dict[str, Any], headers: dict[str, Header]) -> None:
        self.source = source
        self.config = config
        self._headers = headers

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def files(self) -> list[str]:
        """The shards' file names in order."""
        return list(self._headers)

    @property
    def coded(self) -> bool:
        """Whether the tensors are entropress-coded."""
        return coding(self.config) is not None

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The checked manifest; None where there is none. Raises as `read_manifest`."""
        return read_manifest(self.path) if (self.path / layout.MANIFEST).is_file() else None

    def metadata(self, file: str) -> dict[str, str] | None:
        """A shard's ``__metadata__``."""
        return self._headers[file].metadata

    def sidecars(self) -> list[str]:
        """Relative paths of the files beside weights, config and manifest (`find_sidecars`)."""
        return layout.find_sidecars(self.path)

    def tensor_infos(self) -> dict[str, TensorInfo]:
        """All tensors by name, in the order of shards and of offsets within each."""
        return self._infos

    def stored(self, name: str) -> tuple[str, int, int]:
        """Where a tensor's stored bytes lie: file, absolute offset, number of bytes."""
        file, entry = self._locate(name)
        return file, entry.start, entry.nbytes

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[Buffer]:
        """A tensor's little-endian bytes, decoded if coded, in pieces; memory: a few pieces.

        Pieces of a plain tensor have ``size`` bytes, those of a coded one what the codec gives.
        Raises `Corrupt` naming file and tensor.
        """
        file, entry = self._locate(name)
        path = self.path / file
        if not self.coded:
            yield from read_pieces(path, entry.start, entry.nbytes, size)
            return
        with path.open("rb") as stored, _naming(path):
            stored.seek(entry.start)
            for piece in codec.decode_stream(stored.read, entry.nbytes, name):
                yield piece.data

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU, decoded if coded. Raises as `chunks`."""
        import numpy as np
        import torch

        file, entry = self._locate(name)
        info = self.tensor_infos()[name]
        dtype, shape = loading.torch_layout(info.dtype, info.shape, tensor_at(file, name))
        data = np.empty(entry.nbytes, np.uint8)
        read_into(self.path / file, entry.start, data.data)
        if self.coded:
            # The codec holds the size that the header claims against the segments, then allocates.
            with _naming(self.path / file):
                data = codec.decode(data.data, name)
        if not data.size:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(data).view(dtype).reshape(shape)

    def load_model(self, dtype: Any = "auto", device: Any = "cpu") -> Any:
        """The transformers model in eval mode (`loading.load_model`).

        A coded checkpoint needs the quantizer of `compress.hf` to be registered.
        """
        return loading.load_model(self.path, self.config, dtype, device)

    def tokenizer(self) -> Any:
        """The transformers tokenizer; `BadInput` where the directory holds none."""
        return loading.load_tokenizer(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that changes when the files do, found without reading the tensors.

        SHA-256 over the config's bytes, each shard's header, and the name, size and time of change
        of shards and sidecars. It names work directories and is never stored in an output.
        """
        digest = hashlib.sha256((self.path / layout.CONFIG).read_bytes())
        for file in (*self.files, *self.sidecars()):
            stat = (self.path / file).stat()
            header = self._headers[file].sha256 if file in self._headers else ""
            digest.update(f"\0{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{header}".encode())
        return digest.hexdigest()

    @cached_property
    def _entries(self) -> dict[str, tuple[str, Entry]]:
        return {
            name: (file, entry)
            for file, header in self._headers.items()
            for name, entry in header.entries.items()
        }

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: self._info(file, entry) for name, (file, entry) in self._entries.items()}

    def _info(self, file: str, entry: Entry) -> TensorInfo:
        if not self.coded:
            return TensorInfo(
                entry.name, entry.dtype, entry.shape, entry.nbytes, file, False, entry.nbytes
            )
        path = self.path / file
        if entry.dtype != "U8" or len(entry.shape) != 1:
            raise Corrupt(
                "is not a coded tensor",
                where=tensor_at(path, entry.name),
                got=f"{entry.dtype} with {len(entry.shape)} dimensions",
                expected="1-D U8",
            )
        size = min(entry.nbytes, codec.HEADER_MAX)
        with _naming(path):
            header = codec.read_header(
                b"".join(read_pieces(path, entry.start, size, size)), entry.name
            )
        return TensorInfo(
            entry.name, header.dtype, header.shape, header.nbytes, file, True, entry.nbytes
        )

    def _locate(self, name: str) -> tuple[str, Entry]:
        if name not in self._entries:
            raise BadInput("no such tensor", where=tensor_at(self.path, name))
        return self._entries[name]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file in front of what the codec, which knows only the tensor, found corrupt."""
    try:
        yield
    except Corrupt as error:
        raise Corrupt(str(error), where=path) from error
