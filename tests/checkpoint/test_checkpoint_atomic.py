"""Nothing half-written ever bears its final name, whenever the power goes or the disk is full."""

from __future__ import annotations

import resource
from itertools import count

import pytest

from compress.checkpoint import (
    NewTensor,
    atomic_file,
    copy_atomic,
    recover_dir,
    replace_dir,
    write_atomic,
    write_shard,
)
from compress.errors import BadInput, Missing


def test_write_and_replace(tmp_path, contents):
    path = tmp_path / "file.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    copy_atomic(path, tmp_path / "copy")
    assert contents(tmp_path) == {"file.json": b"two", "copy": b"two"}


def test_an_exception_keeps_the_old_file(tmp_path, contents):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"half of the new", None])
    assert contents(tmp_path) == {"file": b"old"}


def test_a_kill_leaves_old_or_new(tmp_path, die_at):
    path = tmp_path / "file"
    for n in count():
        write_atomic(path, b"old")
        died = die_at(lambda: write_atomic(path, b"new"), n)
        assert path.read_bytes() in (b"old", b"new")
        if not died:
            break
    assert path.read_bytes() == b"new"
    assert n > 1


@pytest.fixture
def file_limit():
    """No file may grow beyond 1 MB: what a full disk looks like without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("file_limit")
def test_no_room_on_disk(tmp_path, contents):
    big = bytes(3 << 19)
    writes = {
        "file": lambda path: write_atomic(path, big),
        "in small pieces": lambda path: write_shard(
            path,
            [
                NewTensor(
                    "x", "U8", (len(big),), (big[i : i + 100] for i in range(0, len(big), 100))
                )
            ],
        ),
    }
    for name, write in writes.items():
        with pytest.raises(Missing, match="no room on disk") as caught:
            write(tmp_path / name)
        assert caught.value.exit_code == 3
        assert contents(tmp_path) == {}


def directory(path, text):
    path.mkdir()
    for name in "abc":
        (path / name).write_text(text)
    return path


def test_publishing_refuses_or_replaces(tmp_path, contents):
    final = tmp_path / "out"
    replace_dir(directory(tmp_path / "w1", "one"), final)
    two = directory(tmp_path / "w2", "two")
    with pytest.raises(BadInput, match="exists already"):
        replace_dir(two, final)
    assert contents(final)["a"] == b"one"
    replace_dir(two, final, overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": b"two" for name in "abc"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_replaced_not_followed(tmp_path, contents):
    target = directory(tmp_path / "target", "old")
    (tmp_path / "out").symlink_to(target)
    replace_dir(directory(tmp_path / "w", "new"), tmp_path / "out", overwrite=True)
    assert contents(target)["a"] == b"old"
    assert not (tmp_path / "out").is_symlink()


def test_a_kill_while_publishing_loses_nothing(tmp_path, die_at, contents):
    old, new = (dict.fromkeys("abc", text) for text in (b"old", b"new"))
    outcomes = set()
    for n in count():
        base = tmp_path / str(n)
        base.mkdir()
        final = directory(base / "out", "old")
        work = directory(base / "work", "new")
        died = die_at(lambda work=work, final=final: replace_dir(work, final, overwrite=True), n)
        recover_dir(final)
        assert contents(final) in (old, new)
        if contents(final) == old:
            assert contents(work) == new
        assert {path.name for path in base.iterdir()} <= {"out", "work"}
        outcomes.add(contents(final)["a"])
        if not died:
            break
    assert outcomes == {b"old", b"new"}
    assert contents(final) == new


def test_a_kill_while_recovering_loses_nothing(tmp_path, die_at, contents):
    for n in count():
        final = tmp_path / str(n) / "out"
        final.parent.mkdir()
        directory(final, "new")
        directory(final.with_name(".out.replaced"), "old")
        died = die_at(lambda final=final: recover_dir(final), n)
        recover_dir(final)
        assert contents(final.parent) == {f"out/{name}": b"new" for name in "abc"}
        if not died:
            break
