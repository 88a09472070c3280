"""Attention or MLPs zeroed: chosen by scores, proven, verified, faster where that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import checkpoint as room
from compress import pipeline, stages
from compress import recipe as recipes
from compress.errors import BadInput
from compress.stages import Calibration, StageReport, Workspace

STAGE = stages.get("prune_sublayers")
TEXT = Calibration(sequences=3, length=64)


def prune(source: Path, directory: Path, **options: object) -> tuple[room.Checkpoint, StageReport]:
    config = STAGE.Config.model_validate(options)
    return STAGE.run(room.open(source), config, Workspace(directory, TEXT))


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_the_lowest_scores_go(part: str, tiny_llama: Path, tmp_path: Path) -> None:
    pruned, report = prune(tiny_llama, tmp_path / "out", part=part, drop=2, scorer="norm_ratio")
    scores = report.metrics["scores"]["norm_ratio"]
    free = sorted(range(2, 5), key=lambda block: scores[block])
    assert report.metrics["silenced"] == sorted(free[:2])
    assert pruned.config["per_layer_config"] == {
        str(block): {"skip": [part]} for block in sorted(free[:2])
    }
    for name in pruned.tensor_infos():
        same = torch.equal(pruned.read(name), room.open(tiny_llama).read(name))
        assert same != (name in report.changed)


def test_scores_are_of_the_part(tiny_llama: Path, tmp_path: Path) -> None:
    """The norm ratio of an attention by hand: what it adds over what is then in the stream."""
    _, report = prune(tiny_llama, tmp_path / "out", drop=1)
    model = room.open(tiny_llama).load_model(dtype="float32")
    text = room.open(tiny_llama).tokenizer()
    from compress.signals import ordinary_tokens, windows

    states = {}

    def keep(module: object, args: tuple, kwargs: dict) -> None:
        states["x"] = (args[0] if args else kwargs["hidden_states"])[0]

    def add(module: object, args: tuple, output: tuple) -> None:
        states["added"] = output[0][0]

    block = model.model.layers[2]
    block.register_forward_pre_hook(keep, with_kwargs=True)
    block.self_attn.register_forward_hook(add)
    ratios = []
    for window in windows(TEXT.data, text, TEXT.sequences, TEXT.length, TEXT.seed):
        with torch.no_grad():
            model(input_ids=window[None])
        x, y = states["x"], states["x"] + states["added"]
        keep_them = ordinary_tokens(x, y, torch.ones(len(x), dtype=torch.bool))
        ratio = states["added"].norm(dim=1) / y.norm(dim=1)
        ratios.append(ratio[keep_them].mean().item())
    assert report.metrics["scores"]["norm_ratio"][2] == pytest.approx(
        sum(ratios) / len(ratios), rel=1e-4
    )


def test_through_a_recipe_zeros_cost_nothing_and_stock_transformers_is_right(
    tiny_llama: Path, tmp_path: Path
) -> None:
    from compress.hf.skipping import skip_sublayers

    def recipe(*more: object) -> recipes.Recipe:
        calibration = TEXT.model_dump()
        document = {"version": 1, "calibration": calibration, "stages": [*more, "encode_weights"]}
        return recipes.parse(document)

    whole = pipeline.run(recipe(), tiny_llama, tmp_path / "whole")
    asked = {"prune_sublayers": {"drop": 2}}
    result = pipeline.run(recipe(asked), tiny_llama, tmp_path / "out")
    assert result.bytes_out < 0.95 * whole.bytes_out
    verified = compress.verify(tmp_path / "out", tiny_llama)
    assert verified.ok
    assert len(verified.not_compared) == 8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        stock = model(input_ids=tokens).logits
        skipped = skip_sublayers(model)(input_ids=tokens).logits
    assert torch.equal(stock.view(torch.int32), skipped.view(torch.int32))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"drop": 4}, "prune_sublayers.drop: cannot remove 4 of 6 blocks"),
        ({"drop": 1, "protect": [6]}, "no such block to protect"),
    ],
)
def test_plan_refuses(tiny_llama: Path, options: dict[str, object], complaint: str) -> None:
    config = STAGE.Config.model_validate(options)
    with pytest.raises(BadInput, match=complaint):
        STAGE.plan(room.open(tiny_llama), config, TEXT)
