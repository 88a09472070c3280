"""`resolve` on what is, or should be, on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compress.checkpoint.source import Source, resolve
from compress.errors import BadInput


def test_a_directory_goes_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "my-model"
    directory.mkdir()
    assert resolve(str(directory)) == Source(directory, "my-model", None)
    monkeypatch.chdir(tmp_path)
    assert resolve("my-model") == Source(Path("my-model"), "my-model", None)
    assert resolve("./my-model/").id == "my-model"
    monkeypatch.chdir(directory)
    assert resolve(".").id == "my-model"
    assert resolve("../my-model").id == "my-model"
    (directory / "deeper").mkdir()
    monkeypatch.chdir(directory / "deeper")
    assert resolve("..").id == "my-model"
    assert os.sep not in resolve("/").id


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").path == tmp_path / "model"


def test_a_directory_that_could_be_a_hub_id_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model").path == Path("org/model")


@pytest.mark.parametrize(
    "model",
    [
        "./none",
        "../none",
        "/none",
        "~/none",
        "~nobody-at-all/x",
        "a/b/c",
        "none/",
        "C:none",
        r"a\b",
    ],
)
def test_what_looks_like_a_path_never_reaches_the_hub(model: str) -> None:
    with pytest.raises(BadInput, match="no such directory") as caught:
        resolve(model)
    assert "hub" not in str(caught.value)


@pytest.mark.parametrize(
    "model", ["a b", "org/a b", "héros", "ab:c", "-x", "a\n", "a\0", "x" * 5000]
)
def test_what_is_neither_path_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        resolve(model)


def test_an_empty_name_is_not_the_working_directory() -> None:
    with pytest.raises(BadInput, match="no model"):
        resolve("")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(BadInput, match=r"is a file.*directory"):
        resolve(str(file))


@pytest.mark.parametrize("model", [".", "demo:minilm"])
def test_only_hub_models_have_revisions(model: str) -> None:
    with pytest.raises(BadInput, match="revision v1"):
        resolve(model, revision="v1")
