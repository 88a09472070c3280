"""Tensors come out of plain and coded checkpoints alike, to the bit, and faults say where."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest
import torch

from compress import checkpoint
from compress.checkpoint import NewTensor, write_shard
from compress.errors import BadInput, Corrupt


@pytest.fixture(params=["plain", "coded"])
def opened(request, make_model, arrays, encode, tmp_path):
    first = {name: arrays[name] for name in ("a.weight", "empty")}
    second = {name: array for name, array in arrays.items() if name not in first}
    plain = checkpoint.open(make_model(first, second))
    return plain if request.param == "plain" else encode(plain, tmp_path / "coded")


def test_infos_describe_the_decoded_tensors(opened, arrays):
    infos = opened.tensor_infos()
    assert infos.keys() == arrays.keys()
    assert [info.file for info in infos.values()] == sorted(info.file for info in infos.values())
    for name, info in infos.items():
        assert info.shape == arrays[name].shape
        assert info.nbytes == arrays[name].nbytes
        assert info.coded == opened.coded
        file, start, nbytes = opened.stored(name)
        assert (file, nbytes) == (info.file, info.stored_nbytes)
        assert start + nbytes <= (opened.path / file).stat().st_size
    assert infos["b.weight"].dtype == "F16"


def test_chunks_and_read_give_the_bytes(opened, arrays):
    for name, array in arrays.items():
        assert b"".join(bytes(chunk) for chunk in opened.chunks(name, 100)) == array.tobytes()
        tensor = opened.read(name)
        assert tuple(tensor.shape) == array.shape
        assert tensor.numpy().dtype == array.dtype
        assert tensor.numpy().tobytes() == array.tobytes()


def test_no_such_tensor(opened):
    for get in (opened.read, opened.stored, lambda name: list(opened.chunks(name))):
        with pytest.raises(BadInput, match=r"tensor 'c\.weight': no such tensor"):
            get("c.weight")


def test_chunks_have_the_size_asked_for(make_model):
    opened = checkpoint.open(make_model({"a": np.arange(10, dtype=np.int8)}))
    assert [len(chunk) for chunk in opened.chunks("a", 4)] == [4, 4, 2]


def test_bf16_fp8_and_fp4(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    data = bytes(range(12))
    layouts = {
        "BF16": ((2, 3), torch.bfloat16, (2, 3)),
        "F8_E5M2": ((12,), torch.float8_e5m2, (12,)),
        "F4": ((2, 12), torch.float4_e2m1fn_x2, (2, 6)),
        "F6_E2M3": ((16,), None, None),
    }
    tensors = [NewTensor(dtype, dtype, shape, [data]) for dtype, (shape, _, _) in layouts.items()]
    write_shard(tmp_path / "model.safetensors", tensors)
    opened = checkpoint.open(tmp_path)
    for name, (_, dtype, shape) in layouts.items():
        if dtype is None:
            with pytest.raises(BadInput, match="torch has no dtype for F6_E2M3"):
                opened.read(name)
            continue
        tensor = opened.read(name)
        assert tensor.dtype == dtype
        assert tensor.shape == shape
        assert tensor.view(torch.uint8).numpy().tobytes() == data


def test_a_file_that_shrinks_while_open(make_model):
    opened = checkpoint.open(make_model({"a": np.zeros(100, np.float32)}))
    os.truncate(opened.path / "model.safetensors", 200)
    for get in (opened.read, lambda name: list(opened.chunks(name))):
        with pytest.raises(Corrupt, match=r"model\.safetensors: the file became shorter"):
            get("a")


def test_chunks_hold_one_piece_of_a_huge_tensor(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    size = 1 << 28
    path = tmp_path / "model.safetensors"
    write_shard(path, [NewTensor("a", "U8", (0,), [])])
    raw = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + size)
    opened = checkpoint.open(tmp_path)
    tracemalloc.start()
    assert sum(len(chunk) for chunk in opened.chunks("a", 1 << 22)) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 22


@pytest.fixture
def coded(make_model, arrays, encode, tmp_path):
    return encode(checkpoint.open(make_model(arrays)), tmp_path / "coded")


def test_a_flipped_bit_names_file_and_tensor(coded):
    file, start, nbytes = coded.stored("b.weight")
    path = coded.path / file
    raw = bytearray(path.read_bytes())
    raw[start + nbytes // 2] ^= 4
    path.write_bytes(raw)
    damaged = checkpoint.open(coded.path)
    for get in (damaged.read, lambda name: list(damaged.chunks(name))):
        with pytest.raises(Corrupt) as caught:
            get("b.weight")
        assert file in str(caught.value)
        assert "b.weight" in str(caught.value)
    raw[start + 1] ^= 255
    path.write_bytes(raw)
    with pytest.raises(Corrupt, match=file) as caught:
        checkpoint.open(coded.path).tensor_infos()
    assert "b.weight" in str(caught.value)


def rewrite_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda ours: ours.clear(), Corrupt, "disagree on whether the tensors are coded"),
        (lambda ours: ours.update(min_reader=99), BadInput, "pip install --upgrade entropress"),
        (lambda ours: ours.pop("min_reader"), Corrupt, "lacks min_reader"),
        (lambda ours: ours.update(tensors=1), Corrupt, "do not hold the tensors"),
        (lambda ours: ours.update(names_sha256="0" * 64), Corrupt, "do not hold the tensors"),
    ],
)
def test_a_coded_config_that_contradicts_the_shards(coded, change, error, message):
    rewrite_config(coded.path, change)
    with pytest.raises(error, match=message):
        checkpoint.open(coded.path)


def test_a_dense_tensor_in_a_coded_shard(coded, arrays):
    tensors = [NewTensor(n, "U8", (a.nbytes, 1), [a.tobytes()]) for n, a in arrays.items()]
    write_shard(coded.path / "model.safetensors", tensors, {"entropress": "1"})
    with pytest.raises(Corrupt, match="is not a coded tensor"):
        checkpoint.open(coded.path).tensor_infos()


def test_fingerprint_changes_with_the_files(make_model, arrays):
    directory = make_model(arrays)
    before = checkpoint.open(directory).fingerprint
    assert checkpoint.open(directory).fingerprint == before
    seen = {before}
    for path in (directory / "model.safetensors", directory / "tokenizer.json"):
        os.utime(path, ns=(0, 1))
        seen.add(checkpoint.open(directory).fingerprint)
    (directory / "config.json").write_text("{}")
    seen.add(checkpoint.open(directory).fingerprint)
    assert len(seen) == 4
