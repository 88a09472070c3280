"""A token policy chosen on calibration inputs, stored, and followed by what loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import compress
from compress import checkpoint as room
from compress import pipeline, stages, tokens
from compress import recipe as recipes
from compress.errors import BadInput
from compress.stages import Calibration, StageReport, Workspace

STAGE = stages.get("prune_tokens")
TEXT = Calibration(sequences=20, length=96)
PROMPT = torch.arange(80)[None] * 7 % 300


def prune(
    model: Path, directory: Path, text: Calibration = TEXT, **options: Any
) -> tuple[room.Checkpoint, StageReport]:
    config = STAGE.Config.model_validate({"target": "text", "recent": 8, **options})
    return STAGE.run(room.open(model), config, Workspace(directory, text))


def test_a_policy_is_stored_and_no_weight_changes(tiny_llama: Path, tmp_path: Path) -> None:
    done, report = prune(tiny_llama, tmp_path / "out", keep=0.5, selector="uniform", insist=True)
    policy = tokens.stored_policy(done.config)
    assert policy is not None
    assert (policy.keep, policy.layer, policy.selector) == (0.5, 2, "uniform")
    source = room.open(tiny_llama)
    for name in source.tensor_infos():
        assert torch.equal(done.read(name), source.read(name))
    assert set(report.metrics["losses"]) == {"random", "uniform"}
    assert 0.5 < report.metrics["flops_share"] < 0.9
    model = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    whole = model(PROMPT).logits
    assert tokens.attached(model) is None
    tokens.attach_stored(model)
    assert not torch.equal(model(PROMPT).logits, whole)
    report_ = tokens.last_report(model)
    assert report_ is not None
    assert report_.lengths == (80, 80, 46, 46, 46, 46)  # 68 may go, 34 of them stay, and 12


def test_a_coded_checkpoint_follows_it_by_itself(tiny_llama: Path, tmp_path: Path) -> None:
    stage = {"target": "text", "keep": 0.5, "selector": "uniform", "insist": True, "recent": 8}
    recipe = recipes.parse(
        {
            "version": 1,
            "calibration": {"sequences": 20, "length": 96},
            "stages": [{"prune_tokens": stage}, "encode_weights"],
        }
    )
    pipeline.run(recipe, tiny_llama, tmp_path / "out")
    assert compress.verify(tmp_path / "out", tiny_llama).ok
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokens.attached(model) is not None
    pruned = model(PROMPT).logits
    with tokens.switched_off(model):
        whole = model(PROMPT).logits
    assert torch.equal(whole, AutoModelForCausalLM.from_pretrained(tiny_llama)(PROMPT).logits)
    assert not torch.equal(pruned, whole)
    from compress.hf.quantizer import EntropressConfig

    with pytest.warns(UserWarning, match="tokens.*will be overwritten"):
        plain = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=EntropressConfig(tokens=False)
        )
    assert tokens.attached(plain) is None
    assert tokens.attached(room.open(tmp_path / "out").load_model()) is None
    model.save_pretrained(tmp_path / "again")
    assert tokens.stored_policy(room.open(tmp_path / "again").config) is not None


def test_quantized_and_coded_it_follows_it_too(tiny_llama: Path, tmp_path: Path) -> None:
    stage = {"target": "text", "keep": 0.5, "selector": "uniform", "insist": True, "recent": 8}
    quantize = {"weights": {"method": "rtn", "bits": 4, "group": 16, "symmetric": True}}
    recipe = recipes.parse(
        {
            "version": 1,
            "calibration": {"sequences": 20, "length": 96},
            "stages": [{"quantize": quantize}, {"prune_tokens": stage}, "encode_weights"],
        }
    )
    pipeline.run(recipe, tiny_llama, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokens.attached(model) is not None
    assert model(PROMPT).logits.isfinite().all()


def test_the_selector_must_beat_chance(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """In random weights no token matters more than others to the last ones."""
    model = make_llama(tmp_path / "model")
    with pytest.raises(BadInput, match=r"no selector loses less than chance.*random"):
        prune(model, tmp_path / "out", keep=0.9, candidates=["uniform", "energy"])
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_budget_is_met(tiny_llama: Path, tmp_path: Path) -> None:
    found = {}
    for name, budget in {"flops": {"flops": 0.7}, "average": {"average": 0.6}}.items():
        _, report = prune(
            tiny_llama, tmp_path / name, budget=budget, selector="uniform", insist=True
        )
        found[name] = report.metrics
    assert found["flops"]["flops_share"] <= 0.72
    kept = found["average"]["policy"]["keep"]
    assert (2 + 4 * kept) / 6 == pytest.approx(0.6, abs=0.02)


def test_blocks_are_pruned_before_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    done, _ = prune(tiny_llama, tmp_path / "out", keep=0.5, selector="uniform", insist=True)
    blocks = stages.get("prune_blocks")
    config = blocks.Config.model_validate({"drop": 1})
    with pytest.raises(BadInput, match="prune blocks before tokens"):
        blocks.plan(done, config, TEXT)
    with pytest.raises(BadInput, match="prune blocks before tokens"):
        blocks.run(done, config, Workspace(tmp_path / "again", TEXT))


def test_the_manifest_holds_no_path(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "images.jsonl").write_text('{"image": "x.png", "text": "What?"}\n')
    (tmp_path / "x.png").write_bytes(b"no image")
    stage = {"keep": 0.5, "inputs": str(tmp_path / "images.jsonl")}
    recipe = recipes.parse({"version": 1, "stages": [{"prune_tokens": stage}]})
    assert str(tmp_path) not in json.dumps(pipeline._recorded(recipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either keep or budget"),
        ({"keep": 0.5, "budget": {"flops": 0.5}}, "either keep or budget"),
        ({"keep": 0.5, "selector": "logdte"}, "did you mean"),
        ({"keep": 0.5, "insist": True}, "insists on none"),
        ({"keep": 0.5, "target": "visual"}, "need inputs"),
        ({"keep": 0, "selector": "uniform"}, "greater than 0"),
        ({"budget": {"flops": 0.5, "average": 3}}, "one of average and flops"),
        ({"keep": 0.5, "layer": 0}, "greater than or equal to 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        STAGE.Config.model_validate({"target": "text", **options})


def test_what_is_refused_before_anything_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    def plan(**options: Any) -> None:
        STAGE.plan(room.open(tiny_llama), STAGE.Config.model_validate(options), TEXT)

    lines = tmp_path / "images.jsonl"
    with pytest.raises(BadInput, match=r"no visual tokens are pruned.*llama.*set target to 'text'"):
        plan(keep=0.5, inputs=str(lines))
    with pytest.raises(BadInput, match=r"no such layer.*got layer 6, expected 1 to 5"):
        plan(target="text", keep=0.5, layer=6)
    with pytest.raises(BadInput, match="too few inputs"):
        prune(tiny_llama, tmp_path / "out", Calibration(sequences=4, length=96), keep=0.5)
