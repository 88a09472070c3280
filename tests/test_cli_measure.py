"""`measure`: what of each block, and the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from compress import measure
from compress.errors import BadInput
from compress.main import cli
from compress.stages import Calibration

SMALL = ("--signals", "cosine,norm_ratio", "--sequences", "3", "--length", "64")


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["measure", *SMALL, *map(str, args)])


def test_attention_and_mlp_have_scores_of_their_own(tiny_llama: Path) -> None:
    found = {}
    for granularity in ("block", "attention", "mlp"):
        result = run("--json", "--granularity", granularity, tiny_llama)
        assert result.exit_code == 0, result.output
        found[granularity] = json.loads(result.stdout)
        assert found[granularity]["granularity"] == granularity
        assert found[granularity]["blocks"] == 6
    means = [tuple(each["scores"]["cosine"]) for each in found.values()]
    assert len(set(means)) == 3


def test_an_mlp_is_scored_as_pruning_scores_it(tiny_llama: Path) -> None:
    from compress import checkpoint
    from compress.prune import find_sublayers, sublayer_parts
    from compress.signals import collect, load_float32, windows

    text = Calibration(sequences=3, length=64)
    opened = checkpoint.open(tiny_llama)
    model = load_float32(opened)
    tokens = windows(text.data, opened.tokenizer(), text.sequences, text.length, text.seed)
    parts = sublayer_parts(model, find_sublayers(model), "mlp")
    expected = collect(model, tokens, parts=parts, scorers=["cosine"])
    found = measure(tiny_llama, text, scorers=["cosine"], granularity="mlp")
    assert found.table.values == expected.values


def test_an_unknown_granularity_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match="no such granularity, got head"):
        measure(tiny_llama, granularity="head")  # type: ignore[arg-type]
    assert (
        "'joint' is not one of 'block', 'attention', 'mlp'"
        in run("--granularity", "joint", tiny_llama).stderr
    )


def test_a_picture_is_written_and_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "scores.svg"
    for _ in range(2):
        result = run("--json", "--plot", path, "--drop", 2, tiny_llama)
        assert result.exit_code == 0, result.output
        assert f"wrote {path}" in result.stderr
        assert json.loads(result.stdout)["drop"] == 2
        assert "block: norm_ratio" in path.read_text()


def test_what_cannot_be_drawn_is_refused_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = tmp_path / "no-model"
    assert "expected .png or .svg" in run("--plot", tmp_path / "x.pdf", nothing).stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--plot", tmp_path / "x.png", nothing)
    assert result.exit_code == 3
    assert "pip install 'entropress[report]'" in result.stderr
    assert "no-model" in run(nothing).stderr  # and without a plot nobody misses matplotlib
