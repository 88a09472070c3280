from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress import checkpoint as room
from compress.evaluate.identity import model_identity


@pytest.fixture
def copied(tiny_llama_sharded: Path, tmp_path: Path, own_cache: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_sharded, tmp_path / "copy"))


def identity(directory: Path) -> str:
    return model_identity(room.open(directory))


def test_place_time_and_documents_do_not_matter(tiny_llama_sharded: Path, copied: Path) -> None:
    before = identity(tiny_llama_sharded)
    for path in copied.iterdir():
        os.utime(path, (1, 1))
    (copied / "README.md").write_text("a card")
    (copied / "report").mkdir()
    (copied / "report" / "sizes.png").write_bytes(b"a picture")
    (copied / "entropress.json").write_text("{}")
    (copied / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert identity(copied) == before
    assert len(before) == 64


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "last shard"])
def test_every_byte_matters(name: str, copied: Path) -> None:
    before = identity(copied)
    path = sorted(copied.glob("*.safetensors"))[-1] if name == "last shard" else copied / name
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name == "last shard" else data + b" ")
    assert identity(copied) != before


def test_names_matter(copied: Path) -> None:
    before = identity(copied)
    (copied / "tokenizer_config.json").rename(copied / "tokenizer_konfig.json")
    assert identity(copied) != before


def test_a_model_is_read_once(
    copied: Path, own_cache: Path, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = room.open(copied)
    before = model_identity(model, recorder)
    size = sum((copied / file).stat().st_size for file in (*model.files, *model.sidecars()))
    assert recorder.done["B"] == size + (copied / "config.json").stat().st_size
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", None)
        assert model_identity(model) == before
    (memo,) = (own_cache / "identities").iterdir()
    memo.write_bytes(b"\xff not a digest")
    assert model_identity(model) == before


def test_a_cache_that_cannot_be_written_does_not_matter(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identity(copied)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "file"))
    assert identity(copied) == before
