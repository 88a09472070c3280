"""Rewriting streams, resumes to the byte, and leaves nothing half-done under its final name."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest

from compress import checkpoint
from compress.checkpoint import Digest, NewTensor, rewrite
from compress.errors import BadInput, Missing


@pytest.fixture
def source(make_model, arrays):
    first = {name: arrays[name] for name in ("a.weight", "empty")}
    second = {name: arrays[name] for name in ("b.weight", "scalar")}
    directory = make_model(first, second, {"ünï.weight": arrays["ünï.weight"]})
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool.jinja").write_text("{{ x }}")
    return checkpoint.open(directory)


def copy(source):
    def transform(info):
        chunks = Digest(source.chunks(info.name, 64))
        return [
            NewTensor(
                info.name, info.dtype, info.shape, chunks, lambda: {"sha": chunks.hexdigest()}
            )
        ]

    return transform


class Counting:
    """A progress that adds up."""

    def __init__(self):
        self.totals, self.done, self.notes = [], 0, []

    @contextmanager
    def step(self, label, total, unit="B"):
        self.totals.append((label, total))
        yield self

    def advance(self, amount):
        self.done += amount

    def note(self, line):
        self.notes.append(line)


def test_a_copy(source, tmp_path, arrays, contents):
    progress = Counting()
    made, records = rewrite(source, tmp_path / "out", copy(source), progress=progress, label="copy")
    assert made.source.id == source.source.id
    assert made.files == source.files
    assert list(made.tensor_infos()) == list(source.tensor_infos())
    for name, array in arrays.items():
        assert made.read(name).numpy().tobytes() == array.tobytes()
    assert records.keys() == arrays.keys()
    old, new = contents(source.path), contents(made.path)
    assert new.keys() == old.keys()
    same = ("config.json", "tokenizer.json", "additional_chat_templates/tool.jinja")
    assert all(new[file] == old[file] for file in same)
    nbytes = sum(array.nbytes for array in arrays.values())
    assert progress.totals == [("copy", nbytes)]
    assert progress.done == nbytes
    index = json.loads(new["model.safetensors.index.json"])
    assert index["metadata"] == {"total_size": nbytes}
    assert made.metadata(made.files[0]) == {"format": "pt"}


def test_renaming_splitting_and_removing(source, tmp_path):
    def transform(info):
        if info.file == source.files[1] or info.name == "empty":
            return
        yield NewTensor(f"new.{info.name}", info.dtype, info.shape, source.chunks(info.name))
        yield NewTensor(f"{info.name}.blob", "U8", None, [b"12", b"345"])

    progress = Counting()
    made, records = rewrite(
        source,
        tmp_path / "out",
        transform,
        config={"b": 1, "a": float("inf")},
        metadata={"k": "v"},
        progress=progress,
    )
    assert made.files == [source.files[0], source.files[2]]
    assert list(made.tensor_infos()) == [
        "new.a.weight",
        "a.weight.blob",
        "new.ünï.weight",
        "ünï.weight.blob",
    ]
    assert made.read("a.weight.blob").numpy().tobytes() == b"12345"
    assert made.config == {"a": float("inf"), "b": 1}
    assert made.metadata(made.files[1]) == {"k": "v"}
    assert records == {}
    assert progress.done == progress.totals[0][1]


def test_a_single_file_needs_no_index(make_model, arrays, tmp_path, contents):
    single = checkpoint.open(make_model(arrays))
    rewrite(single, tmp_path / "out", copy(single))
    assert contents(tmp_path / "out").keys() == contents(single.path).keys()


def test_a_part_on_its_own_gets_an_index(make_model, arrays, tmp_path):
    directory = make_model(arrays)
    name = "model-00001-of-00001.safetensors"
    (directory / "model.safetensors").rename(directory / name)
    alone = checkpoint.open(directory)
    made, _ = rewrite(alone, tmp_path / "out", copy(alone))
    assert made.files == [name]
    assert (made.path / "model.safetensors.index.json").exists()


def test_never_into_its_own_input(source, contents):
    before = contents(source.path)
    with pytest.raises(BadInput, match="the output is the input"):
        rewrite(source, source.path, copy(source))
    assert contents(source.path) == before


def test_a_kill_anywhere_then_the_same_bytes(source, tmp_path, die_at, contents):
    whole, records = rewrite(source, tmp_path / "whole", copy(source))
    expected = contents(whole.path)
    for n in count():
        out = tmp_path / str(n)
        died = die_at(lambda out=out: rewrite(source, out, copy(source)), n)
        half = contents(out) if out.exists() else {}
        assert all(expected[file] == data for file, data in half.items() if file in expected)
        if not died:
            assert half == expected
            break
        resumed, again = rewrite(source, out, copy(source))
        assert contents(resumed.path) == expected
        assert again == records
    assert n > 40


def test_finished_shards_are_not_written_again(source, tmp_path, contents):
    out = tmp_path / "out"
    calls = Counter()

    def failing(info):
        calls[info.file] += 1
        if info.file == source.files[1]:
            raise RuntimeError
        return copy(source)(info)

    with pytest.raises(RuntimeError):
        rewrite(source, out, failing)
    assert contents(out).keys() == {source.files[0], f"{source.files[0]}.done.json"}
    inode = (out / source.files[0]).stat().st_ino
    calls.clear()
    progress = Counting()

    def counting(info):
        calls[info.file] += 1
        return copy(source)(info)

    rewrite(source, out, counting, progress=progress)
    assert calls.keys() == set(source.files[1:])
    assert (out / source.files[0]).stat().st_ino == inode
    assert progress.notes == [f"{source.files[0]}: kept from the interrupted run"]
    assert progress.done == progress.totals[0][1]


def test_an_error_while_reading_leaves_no_part(source, tmp_path, contents):
    def broken(info):
        yield NewTensor(info.name, info.dtype, info.shape, iter([b"1", None]))

    with pytest.raises(TypeError):
        rewrite(source, tmp_path / "out", broken)
    assert contents(tmp_path / "out") == {}


def test_no_room_then_resume(source, tmp_path, contents):
    whole, _ = rewrite(source, tmp_path / "whole", copy(source))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(Missing, match="no room on disk") as caught:
            rewrite(source, tmp_path / "out", copy(source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 3
    assert not [file for file in contents(tmp_path / "out") if file.endswith(".part")]
    resumed, _ = rewrite(source, tmp_path / "out", copy(source))
    assert contents(resumed.path) == contents(whole.path)


def test_memory_is_a_few_chunks(tmp_path):
    import tracemalloc

    directory = tmp_path / "big"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    size = 200 << 20
    raw = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + size)
    big = checkpoint.open(directory)
    tracemalloc.start()
    made, _ = rewrite(
        big,
        tmp_path / "out",
        lambda info: [NewTensor("a", "U8", info.shape, big.chunks("a"))],
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * checkpoint.checkpoint.CHUNK
    assert made.tensor_infos()["a"].nbytes == size


def test_coded_and_back(source, encode, tmp_path, arrays):
    coded = encode(source, tmp_path / "coded")
    assert coded.coded
    assert np.array_equal(coded.read("b.weight").numpy(), arrays["b.weight"])
    dense, _ = rewrite(coded, tmp_path / "dense", copy(coded), config={}, metadata={"format": "pt"})
    assert not dense.coded
    for name, array in arrays.items():
        assert dense.read(name).numpy().tobytes() == array.tobytes()
        assert tuple(dense.read(name).shape) == array.shape
