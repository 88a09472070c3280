"""Pruning what was pruned: nothing is removed twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import checkpoint as room
from compress import stages
from compress.errors import BadInput
from compress.prune import find_units
from compress.signals import load_float32
from compress.stages import Calibration, Workspace

STAGE = stages.get("prune_blocks")
TEXT = Calibration(sequences=2, length=64)


def prune(source: Path, directory: Path, **options: object) -> dict[str, list[int]]:
    config = STAGE.Config.model_validate({"scorer": "cosine", **options})
    _, report = STAGE.run(room.open(source), config, Workspace(directory, TEXT))
    return report.metrics["removed"]


@pytest.mark.parametrize("search", ["one_shot", "greedy"])
def test_the_next_ones_go(search: str, tiny_llama: Path, tmp_path: Path) -> None:
    options = {"granularity": "attention", "search": search}
    first = prune(tiny_llama, tmp_path / "1", drop=1, **options)["attention"]
    second = prune(tmp_path / "1", tmp_path / "2", drop=2, **options)["attention"]
    assert not set(first) & set(second)
    named = json.loads((tmp_path / "2" / "config.json").read_text())["per_layer_config"]
    assert {int(i) for i in named} == {*first, *second} == {2, 3, 4}
    units = find_units(load_float32(room.open(tmp_path / "2")), "joint")
    assert units.gone == {("attention", i) for i in (2, 3, 4)}
    assert units.free() == [("mlp", i) for i in (2, 3, 4)]


def test_what_is_named_goes_along_with_its_block(tiny_llama: Path, tmp_path: Path) -> None:
    prune(tiny_llama, tmp_path / "1", granularity="mlp", drop=1, protect=[0, 1, 2, 3, 5])
    prune(tmp_path / "1", tmp_path / "2", drop=1, protect=[0, 1, 3, 4, 5])
    config = json.loads((tmp_path / "2" / "config.json").read_text())
    assert config["per_layer_config"] == {"3": {"skip": ["mlp"]}}
    prune(tmp_path / "2", tmp_path / "3", drop=1, protect=[0, 1, 2, 4])
    assert "per_layer_config" not in json.loads((tmp_path / "3" / "config.json").read_text())


def test_a_part_that_nobody_knows(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    path = make_llama(tmp_path) / "config.json"
    stated = json.loads(path.read_text()) | {"per_layer_config": {"3": {"skip": ["banana"]}}}
    path.write_text(json.dumps(stated))
    with pytest.raises(BadInput, match="skips an unknown part"):
        STAGE.plan(room.open(tmp_path), STAGE.Config(drop=1), TEXT)


def test_a_coded_model_is_taken_in(tiny_llama: Path, tmp_path: Path) -> None:
    from compress import pipeline, recipe

    def run(source: Path, output: Path, *steps: object) -> None:
        document = {"version": 1, "calibration": TEXT.model_dump(), "stages": list(steps)}
        pipeline.run(recipe.parse(document), source, output)

    run(tiny_llama, tmp_path / "coded", "encode_weights")
    run(tmp_path / "coded", tmp_path / "out", {"prune_blocks": {"drop": 1}}, "encode_weights")
    assert room.open(tmp_path / "out").coded
