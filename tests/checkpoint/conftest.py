"""Small model directories made with the official safetensors library."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress import checkpoint, codec
from compress.checkpoint import Checkpoint, NewTensor, TensorInfo

Arrays = dict[str, np.ndarray]


@pytest.fixture
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(7, 5)).astype(np.float32),
        "b.weight": rng.normal(size=(64, 33)).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3, np.int64),
        "ünï.weight": rng.integers(0, 255, 11).astype(np.uint8),
    }


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model directory: one shard for each mapping of arrays, with an index if several."""

    def make(*shards: Arrays, name: str = "model") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        weight_map = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else file
            save_file(shard, directory / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        (directory / "config.json").write_text('{"model_type":"llama"}')
        (directory / "tokenizer.json").write_text('{"tokens": []}')
        return directory

    return make


@pytest.fixture
def encode() -> Callable[[Checkpoint, Path], Checkpoint]:
    """Entropy-code a checkpoint into a directory."""

    def code(info: TensorInfo, source: Checkpoint) -> Iterator[NewTensor]:
        chunks = codec.encode(info.name, info.dtype, info.shape, source.chunks(info.name))
        yield NewTensor(info.name, "U8", None, chunks)

    def encode(source: Checkpoint, directory: Path) -> Checkpoint:
        names = source.tensor_infos()
        ours = {
            "quant_method": checkpoint.QUANT_METHOD,
            "min_reader": codec.MIN_READER,
            "tensors": len(names),
            "names_sha256": checkpoint.names_sha256(names),
        }
        return checkpoint.rewrite(
            source,
            directory,
            lambda info: code(info, source),
            config=source.config | {"quantization_config": ours},
            metadata={"format": "pt", "entropress": "1"},
        )[0]

    return encode


@pytest.fixture
def write_raw() -> Callable[..., None]:
    """A safetensors file with any header: a document, or bytes taken as they are."""

    def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = len(raw) if length is None else length
        path.write_bytes(struct.pack("<Q", length) + raw + data)

    return write
