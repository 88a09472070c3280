from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compress import checkpoint as room
from compress import stages
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.signals import SCORERS_DEFAULT
from compress.stages import Calibration, StageReport, Workspace

STAGE = stages.get("prune_blocks")
TEXT = Calibration(sequences=3, length=64)
BLOCKS = 6


def config(**options: Any) -> Any:
    return STAGE.Config(**{"drop": 2, **options})


def prune(
    model: Path | Checkpoint, directory: Path, threads: int = 1, **options: Any
) -> tuple[Checkpoint, StageReport]:
    original = model if isinstance(model, Checkpoint) else room.open(model)
    workspace = Workspace(directory, calibration=TEXT, threads=threads)
    return STAGE.run(original, config(**options), workspace)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama_tied", "tiny_llama_sharded"])
def test_the_outcome_loads_and_the_plan_was_exact(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(model)
    estimate = STAGE.plan(room.open(directory), config(), TEXT)
    pruned, report = prune(directory, tmp_path / "out")
    assert estimate.nbytes == sum(info.nbytes for info in pruned.tensor_infos().values())
    assert estimate.nbytes == report.metrics["bytes_out"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == BLOCKS - 2
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_output_is_that_of_the_model_without_the_blocks(
    tiny_llama: Path, tmp_path: Path
) -> None:
    _, report = prune(tiny_llama, tmp_path / "out", scorer="cosine")
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    removed = report.metrics["removed"]
    whole.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(whole.model.layers) if i not in removed
    )
    for i, layer in enumerate(whole.model.layers):
        layer.self_attn.layer_idx = i
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        ours, theirs = (m(tokens, use_cache=False).logits for m in (pruned, whole))
    assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("scorer", SCORERS_DEFAULT)
def test_the_scorer_decides_and_the_others_are_reported(
    scorer: str, tiny_llama: Path, tmp_path: Path
) -> None:
    _, report = prune(tiny_llama, tmp_path / "out", scorer=scorer)
    metrics = report.metrics
    assert metrics["removed"] == metrics["would_remove"][scorer]
    scores = metrics["scores"][scorer]
    lowest = sorted((2, 3, 4), key=lambda block: scores[block])[:2]
    assert metrics["removed"] == sorted(lowest)
    assert set(metrics["would_remove"]) == set(metrics["scores"]) == set(SCORERS_DEFAULT)
    assert len(metrics["agreement"]) == 6
    assert ", ".join(map(str, metrics["removed"])) in report.summary
    assert scorer in report.summary


def test_every_tensor_is_accounted_for(tiny_llama_sharded: Path, tmp_path: Path) -> None:
    original = room.open(tiny_llama_sharded)
    pruned, report = prune(tiny_llama_sharded, tmp_path / "out")
    origins = {name: report.renamed.get(name, name) for name in pruned.tensor_infos()}
    assert {*origins.values(), *report.removed} == set(original.tensor_infos())
    assert all(torch.equal(pruned.read(new), original.read(old)) for new, old in origins.items())
    assert all(new != old for new, old in report.renamed.items())


def test_two_runs_give_the_same_bytes_whatever_the_threads(
    tiny_llama: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    reports = [
        prune(tiny_llama, tmp_path / str(threads), threads)[1].model_dump_json()
        for threads in (1, 3)
    ]
    assert reports[0] == reports[1]
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    json.dumps(json.loads(reports[0]), allow_nan=False)


def test_protected_blocks_stay(tiny_llama: Path, tmp_path: Path) -> None:
    _, report = prune(tiny_llama, tmp_path / "out", protect=[2, 3, 4], drop=3)
    assert report.metrics["removed"] == [0, 1, 5]


def test_a_coded_checkpoint_is_pruned_and_comes_out_dense(
    tiny_llama: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    encode = stages.get("encode_weights")
    coded, _ = encode.run(
        room.open(tiny_llama), encode.Config(), Workspace(tmp_path / "coded", TEXT)
    )
    assert STAGE.plan(coded, config(), TEXT) == STAGE.plan(room.open(tiny_llama), config(), TEXT)
    from_coded, report = prune(coded, tmp_path / "from_coded")
    from_plain, expected = prune(tiny_llama, tmp_path / "from_plain")
    assert report == expected
    assert not from_coded.coded
    found, wanted = contents(from_coded.path), contents(from_plain.path)
    assert found["model.safetensors"] == wanted["model.safetensors"]
    assert from_coded.config == from_plain.config


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"drop": 4}, {}, "cannot remove 4 of 6 blocks, 3 of them protected, got 4, .* most 3"),
        ({"drop": 6, "protect": []}, {}, "cannot remove 6 of 6 blocks, 0 of them"),
        ({"protect": [6]}, {}, "protect: no such block to protect, got 6, expected 0 to 5"),
        ({}, {"length": 16}, r"calibration\.length: .*got 16"),
        ({}, {"length": 4096}, r"calibration\.length: .*got 4096, expected at most 128"),
        ({}, {"data": "no.txt"}, r"no\.txt: no such file"),
    ],
)
def test_what_cannot_be_is_found_when_planning(
    options: dict[str, Any], text: dict[str, Any], message: str, tiny_llama: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        STAGE.plan(room.open(tiny_llama), config(**options), TEXT.model_copy(update=text))


def test_a_null_quantization_config_is_none(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_llama(tmp_path) / "config.json"
    plain = STAGE.plan(room.open(tmp_path), config(), TEXT)
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": None}))
    assert STAGE.plan(room.open(tmp_path), config(), TEXT) == plain


def test_models_that_cannot_be_pruned_are_found_when_planning(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_llama(tmp_path) / "config.json"
    original = json.loads(path.read_text())
    for extra, message in (
        ({"quantization_config": {"quant_method": "awq"}}, "prune before quantizing"),
        ({"num_hidden_layers": 5}, "there are more than num_hidden_layers"),
        ({"num_hidden_layers": 7}, "no single stack of 7 blocks"),
        ({"block_scales": [1.0] * 6}, "block_scales"),
        ({"model_type": "unheard_of"}, "unheard_of"),
    ):
        path.write_text(json.dumps({**original, **extra}))
        with pytest.raises(BadInput, match=message):
            STAGE.plan(room.open(tmp_path), config(), TEXT)


@pytest.mark.parametrize(
    "options", [{"drop": 0}, {"drop": -1}, {"scorer": "entropy"}, {"protect": [-1]}, {"drpo": 1}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**options)


def test_a_model_without_a_tokenizer(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BadInput, match="no tokenizer"):
        prune(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_scorer_can_be_named() -> None:
    from typing import get_args

    from compress.signals import SCORERS
    from compress.stages.prune_blocks import Scorer

    assert get_args(Scorer) == SCORERS


def test_healing_changes_the_block_before_the_gap_and_nothing_else(
    tiny_llama: Path, tmp_path: Path
) -> None:
    source = room.open(tiny_llama)
    config = STAGE.Config(drop=1, protect=[0, 1, 2, 4, 5], heal="linear")
    healed, report = STAGE.run(source, config, Workspace(tmp_path / "out", TEXT))
    assert report.metrics["removed"] == [3]
    assert report.changed == ["model.layers.2.mlp.down_proj.weight"]
    assert "healed by a linear fold" in report.summary
    for name in healed.tensor_infos():
        old = report.renamed.get(name, name)
        assert torch.equal(healed.read(name), source.read(old)) != (name in report.changed)
