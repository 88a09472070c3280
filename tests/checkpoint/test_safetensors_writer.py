"""What the streaming writer writes, the official library opens with the same names and bytes."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file

from compress.checkpoint import Digest, NewTensor, write_shard
from compress.checkpoint.safetensors_reader import read_header

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
tensors = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: hnp.arrays(
        DTYPES[dtype], hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
    ).map(lambda array: (dtype, array))
)


def pieces(data: bytes, size: int):
    return (data[i : i + size] for i in range(0, len(data), size))


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.dictionaries(names, tensors, max_size=6),
    metadata=st.none() | st.dictionaries(names, names, max_size=2),
    size=st.integers(1, 40),
)
def test_the_official_library_reads_it(tmp_path, content, metadata, size):
    path = tmp_path / "x.safetensors"
    write_shard(
        path,
        [
            NewTensor(name, dtype, array.shape, pieces(array.tobytes(), size))
            for name, (dtype, array) in content.items()
        ],
        metadata,
    )
    loaded = load_file(path)
    assert loaded.keys() == content.keys()
    for name, (_, array) in content.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()
    with safe_open(path, "np") as file:
        assert (file.metadata() or {}) == (metadata or {})
    entries = read_header(path).entries.values()
    assert [e.name for e in entries if e.nbytes] == [n for n, (_, a) in content.items() if a.nbytes]
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def test_tensors_of_unknown_length(tmp_path):
    path = tmp_path / "x.safetensors"
    blobs = {"one": b"x" * 100_001, "none": b"", "two": b"y"}
    write_shard(path, [NewTensor(n, "U8", None, pieces(b, 999)) for n, b in blobs.items()])
    loaded = load_file(path)
    assert {name: array.tobytes() for name, array in loaded.items()} == blobs
    assert loaded["one"].shape == (100_001,)


def test_torch_reads_bf16_fp8_and_unaligned_tensors(tmp_path):
    import torch
    from safetensors.torch import load_file as load_torch

    path = tmp_path / "x.safetensors"
    data = np.arange(12, dtype=np.uint8).tobytes()
    write_shard(
        path,
        [
            NewTensor("odd", "U8", (1,), [b"1"]),
            NewTensor("bf16", "BF16", (2, 3), [data]),
            NewTensor("fp8", "F8_E4M3", (12,), [data]),
            NewTensor("f32", "F32", (3,), [data]),
        ],
    )
    loaded = load_torch(path)
    assert loaded["bf16"].dtype == torch.bfloat16
    assert loaded["bf16"].shape == (2, 3)
    assert loaded["fp8"].dtype == torch.float8_e4m3fn
    for name in ("bf16", "fp8", "f32"):
        assert loaded[name].contiguous().view(torch.uint8).numpy().tobytes() == data


def test_records_follow_the_chunks(tmp_path):
    digest = Digest(pieces(b"abcdef", 4))
    done: list[str] = []
    records = write_shard(
        tmp_path / "x.safetensors",
        [
            NewTensor("a", "U8", (6,), digest, record=lambda: {"sha256": digest.hexdigest()}),
            NewTensor("b", "U8", (0,), []),
        ],
        done=lambda tensor: done.append(tensor.name),
    )
    assert records == {"a": {"sha256": hashlib.sha256(b"abcdef").hexdigest()}}
    assert done == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        [NewTensor("a", "F32", (2,), [b"1234567"])],
        [NewTensor("a", "U8", (1,), [b"1"]), NewTensor("a", "U8", (1,), [b"2"])],
    ],
    ids=["wrong size", "a name twice"],
)
def test_impossible_requests_leave_no_file(tmp_path, content):
    with pytest.raises(ValueError):
        write_shard(tmp_path / "x.safetensors", content)
    assert list(tmp_path.iterdir()) == []
