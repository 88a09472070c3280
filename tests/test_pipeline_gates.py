"""Gates in a recipe: when they run, what they leave, and what a kill does to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import checkpoint as room
from compress import gates, pipeline
from compress import recipe as recipes
from compress.errors import BadInput
from compress.proof import prove
from compress.workspace import RunDirectory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{i} sheep and {i + 1} goats went up a hill"}) for i in range(12)]
    path.write_text("\n".join(lines))
    return str(path)


def recipe(text: str, max_ratio: float, stages: Any = ("encode_weights",)) -> recipes.Recipe:
    return recipes.parse(
        {
            "version": 1,
            "calibration": {"sequences": 2, "length": 64},
            "stages": list(stages),
            "gates": [
                "bit_exact",
                {"perplexity": {"data": text, "length": 64, "max_ratio": max_ratio}},
            ],
        }
    )


PRUNE = ({"prune_blocks": {"drop": 2}}, "encode_weights")


def test_gates_that_pass(tiny_llama: Path, tmp_path: Path, text: str) -> None:
    result = pipeline.run(recipe(text, 1.0), tiny_llama, tmp_path / "out")
    assert result.passed
    recorded = room.read_manifest(tmp_path / "out")
    assert [gate["verdict"] for gate in recorded["gates"]] == ["passed", "passed"]
    assert recorded["recipe"]["gates"][1]["perplexity"]["data"] == "text.jsonl"
    assert compress.verify(tmp_path / "out", tiny_llama).ok


def test_a_failed_gate_leaves_a_complete_output(
    tiny_llama: Path, tmp_path: Path, text: str
) -> None:
    result = pipeline.run(recipe(text, 0.5, PRUNE), tiny_llama, tmp_path / "out")
    assert not result.passed
    assert [gate.verdict for gate in result.gates] == ["failed", "failed"]
    assert compress.verify(tmp_path / "out", tiny_llama).ok
    assert room.open(tmp_path / "out").manifest["gates"][1]["rows"][0]["limit"] == 0.5
    assert not list(tmp_path.glob(".out*"))


def test_a_gate_that_cannot_be_checked_is_refused_before_anything_is_made(
    tiny_llama: Path, tmp_path: Path
) -> None:
    for work in (
        lambda chosen: pipeline.run(chosen, tiny_llama, tmp_path / "out"),
        lambda chosen: pipeline.plan(chosen, tiny_llama),
    ):
        with pytest.raises(BadInput, match="no such file"):
            work(recipe("nowhere.txt", 1.0))
    assert list(tmp_path.iterdir()) == []


def test_killed_in_a_gate_it_is_not_published_and_resumes_to_the_same_bytes(
    tiny_llama: Path,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    chosen = recipe(text, 2.0, PRUNE)
    pipeline.run(chosen, tiny_llama, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(type(gates.get("perplexity")), "check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(chosen, tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipeline.run(chosen, tiny_llama, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_after_publishing_other_gates_are_not_taken_for_checked(
    tiny_llama: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(recipe(text, 2.0), tiny_llama, tmp_path / "out")
    with pytest.raises(BadInput, match="was another run"):
        pipeline.run(recipe(text, 0.5), tiny_llama, tmp_path / "out", resume=True)
    assert pipeline.run(recipe(text, 2.0), tiny_llama, tmp_path / "out", resume=True).passed


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_recipe_of_gates_alone_makes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="gates but no stage; use `eval`"):
        pipeline.run("gates.yaml", tiny_llama, tmp_path / "out")


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("perplexety", r"gates\.0: unknown gate 'perplexety'; did you mean 'perplexity'\?"),
        ("perplexity", r"gates\.0\.perplexity\.max_ratio: missing key"),
        ({"perplexity": {"max_ratio": 1, "max_raito": 2}}, "did you mean 'max_ratio'"),
        ({"divergence": {}}, "give max_kl or max_jsd"),
        ({"lm_eval": {"tasks": [], "max_drop": 0}}, "gates.0.lm_eval.tasks"),
        ({"bit_exact": {}, "perplexity": {}}, "a gate is one name with its options"),
    ],
)
def test_bad_gates_are_named(entry: Any, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        recipes.parse({"version": 1, "stages": ["encode_weights"], "gates": [entry]})


def test_gates_can_be_overridden(text: str) -> None:
    chosen = recipes.load(recipe(text, 1.0), ["gates.perplexity.max_ratio=3"])
    assert chosen.gates[1].config.max_ratio == 3
    assert recipes.load(chosen, ["gates=[]"]).gates == ()


def test_recorded_gates_replace_those_of_the_same_options(
    tiny_llama: Path, tmp_path: Path, text: str
) -> None:
    pipeline.run("lossless.yaml", tiny_llama, tmp_path / "out")
    for limit, expected in ((0.5, ["failed"]), (1.0, ["failed", "passed"])):
        claims = recipe(text, limit)
        claims = recipes.Recipe("claims", claims.model, claims.calibration, (), claims.gates[1:])
        for _ in range(2):
            prove(tmp_path / "out", baseline=tiny_llama, recipe=claims, record=True)
        recorded = room.read_manifest(tmp_path / "out")["gates"]
        assert [gate["verdict"] for gate in recorded] == expected
    assert compress.verify(tmp_path / "out", tiny_llama).ok
