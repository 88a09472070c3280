"""Every fault of a safetensors header is named; nothing hostile makes the reader allocate."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from compress.checkpoint.safetensors_reader import read_header
from compress.errors import BadInput, Corrupt


def entry(dtype="U8", shape=(2,), offsets=(0, 2), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_reads_what_the_official_library_writes(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: e.shape for name, e in header.entries.items()} == {
        name: a.shape for name, a in arrays.items()
    }
    data = path.read_bytes()
    for name, e in header.entries.items():
        assert data[e.start : e.start + e.nbytes] == arrays[name].tobytes()


TENSOR_FAULTS = {
    "overlap": {"a": entry(), "x": entry(offsets=(1, 3))},
    "gap": {"a": entry(), "x": entry(offsets=(3, 5))},
    "past the end": {"x": entry(shape=(9,), offsets=(0, 9))},
    "huge offsets": {"x": entry(shape=(2**62,), offsets=(0, 2**62))},
    "backwards": {"x": entry(offsets=(2, 0))},
    "size": {"x": entry(shape=(3,))},
    "huge shape": {"x": entry(shape=(2**40, 2**40))},
    "endless shape": {"x": entry(shape=(2**60,) * 100_000)},
    "negative shape": {"x": entry(shape=(-1, -2))},
    "float shape": {"x": entry(shape=(2.0,))},
    "bool shape": {"x": entry(shape=(True, 2))},
    "negative offsets": {"x": entry(offsets=(-2, 0))},
    "three offsets": {"x": entry(offsets=(0, 1, 2))},
    "text offsets": {"x": entry(offsets="02")},
    "unknown dtype": {"x": entry(dtype="Q7")},
    "endless dtype": {"x": entry(dtype="F" * 1_000_000)},
    "dtype of a wrong type": {"x": entry(dtype=["U8"])},
    "half a byte": {"x": entry(dtype="F4", shape=(3,))},
    "unknown member": {"x": entry(extra=1)},
    "missing member": {"x": {"dtype": "U8", "shape": [2]}},
    "not an object": {"x": 1},
}


@pytest.mark.parametrize("header", TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_a_fault_names_file_and_tensor(tmp_path, write_raw, header):
    path = tmp_path / "shard.safetensors"
    write_raw(path, header, b"12345")
    with pytest.raises(Corrupt, match=r"shard\.safetensors: tensor 'x'"):
        read_header(path)


FILE_FAULTS = {
    "a list": b"[]",
    "not JSON": b"{",
    "leading space": b" {}",
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a key twice": b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "a lone surrogate": b'{"\\uD800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "nested deeply": b'{"x":' + b"[" * 200_000,
    "a huge number": b'{"x":' + b"9" * 10_000 + b"}",
    "metadata of numbers": b'{"__metadata__":{"a":1}}',
    "metadata of a wrong type": b'{"__metadata__":[]}',
}


@pytest.mark.parametrize("raw", FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_a_header_that_is_no_header(tmp_path, write_raw, raw):
    path = tmp_path / "shard.safetensors"
    write_raw(path, raw)
    with pytest.raises(Corrupt, match=r"shard\.safetensors"):
        read_header(path)


def test_bytes_after_the_last_tensor(tmp_path, write_raw):
    path = tmp_path / "shard.safetensors"
    write_raw(path, {"x": entry()}, b"123")
    with pytest.raises(Corrupt, match="after the last tensor, got 1"):
        read_header(path)


@pytest.mark.parametrize("length", [3, 2**20, 100_000_001, 2**63, 2**64 - 1])
def test_a_hostile_length_allocates_nothing(tmp_path, write_raw, length):
    path = tmp_path / "shard.safetensors"
    write_raw(path, b"{}", length=length)
    tracemalloc.start()
    with pytest.raises(Corrupt, match="header length"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short_for_a_length(tmp_path, size):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(Corrupt):
        read_header(path)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(Corrupt, match=r"nowhere\.safetensors: the shard is missing"):
        read_header(tmp_path / "nowhere.safetensors")
    with pytest.raises(BadInput, match="cannot be read"):
        read_header(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_truncated_or_changed_files_never_crash(tmp_path, data):
    path = tmp_path / "shard.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 2), np.int8)}, path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(raw) - 1))
        path.write_bytes(raw[:cut])
        with pytest.raises(Corrupt):
            read_header(path)
        return
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except Corrupt:
        return
    # What is accepted is consistent: the tensors tile the data.
    assert sum(e.nbytes for e in header.entries.values()) == len(raw) - end


def test_accepts_whatever_the_official_reader_pads(tmp_path, write_raw):
    path: Path = tmp_path / "shard.safetensors"
    write_raw(path, b'{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   ', b"12")
    assert read_header(path).entries["x"].nbytes == 2
