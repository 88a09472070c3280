"""Healing within the stage: only where it helps, and nothing but the blocks before the gaps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress import stages
from compress.errors import BadInput
from compress.progress import Silent
from compress.prune import RemovalLoss, find_units
from compress.signals import load_float32, windows
from compress.stages import Calibration, StageReport, Workspace

STAGE = stages.get("prune_blocks")
TEXT = Calibration(sequences=4, length=64)
LAST_BUT_ONE = {"drop": 1, "protect": [0, 1, 2, 4, 5]}  # block 3 goes


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def prune(
    model: Path, directory: Path, **options: Any
) -> tuple[room.Checkpoint, StageReport, list[str]]:
    notes = Notes()
    scratch = directory.with_name(f"{directory.name}.scratch")
    scratch.mkdir()
    workspace = Workspace(directory, TEXT, notes, 1, scratch)
    return *STAGE.run(room.open(model), STAGE.Config(**options), workspace), notes.lines


@pytest.fixture(scope="module")
def mild(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose block 3 is linear in what block 2's MLP gives, and so can be made up for."""
    from transformers import AutoModelForCausalLM

    directory = make_llama(tmp_path_factory.mktemp("mild"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for i, layer in enumerate(model.model.layers):
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data = torch.randn(weight.shape, generator=generator) * (0.3 if i == 2 else 0.1)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("method", ["linear", "auto", "distill"])
def test_what_is_reported_is_what_was_written(method: str, mild: Path, tmp_path: Path) -> None:
    training = {"distillation": {"steps": 4, "batch": 2, "rate": 1e-3}}
    options = {**LAST_BUT_ONE, "heal": method, **(training if method == "distill" else {})}
    healed, report, _ = prune(mild, tmp_path / "out", **options)
    told = report.metrics["healing"]
    assert told["method"] == ("linear" if method == "auto" else method)
    assert told["kept"]
    assert told["kl_after"] < told["kl_before"]
    assert len(told["history"]) == (4 if method == "distill" else 0)
    assert "healed by" in report.summary
    source = room.open(mild)
    rows = windows(TEXT.data, source.tokenizer(), 6, TEXT.length, TEXT.seed)
    whole = load_float32(source)
    [before] = RemovalLoss(whole, rows[4:])([frozenset({("block", 3)})])
    assert told["kl_before"] == pytest.approx(before, rel=1e-4)
    pruned = load_float32(healed)
    with torch.no_grad():
        p, q = (m(rows[4:]).logits.double().log_softmax(-1) for m in (whole, pruned))
    assert told["kl_after"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    for name in healed.tensor_infos():
        old = report.renamed.get(name, name)
        assert torch.equal(healed.read(name), source.read(old)) != (name in report.changed)
    if method != "distill":
        assert report.changed == ["model.layers.2.mlp.down_proj.weight"]


def test_attention_is_healed_too(mild: Path, tmp_path: Path) -> None:
    healed, report, _ = prune(
        mild, tmp_path / "out", **LAST_BUT_ONE, granularity="attention", heal="linear"
    )
    assert report.metrics["healing"]["kept"]
    assert report.changed == [
        "model.layers.2.mlp.down_proj.weight",
        *(f"model.layers.3.self_attn.{p}_proj.weight" for p in "koqv"),
    ]
    assert find_units(load_float32(healed), "attention").blocks == 6


def test_a_model_that_cannot_be_healed(tiny_llama: Path, tmp_path: Path) -> None:
    """Gemma 2 norms what an MLP gives before it is added."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, max_position_embeddings=128))
    model.save_pretrained(tmp_path / "model")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    with pytest.raises(BadInput, match="cannot be healed"):
        prune(tmp_path / "model", tmp_path / "strict", **LAST_BUT_ONE, heal="linear")
    _, report, notes = prune(tmp_path / "model", tmp_path / "auto", **LAST_BUT_ONE, heal="auto")
    assert report.metrics["healing"] is None
    assert any("not healed: " in line for line in notes)
