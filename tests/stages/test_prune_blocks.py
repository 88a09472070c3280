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
from compress import recipe as recipes
from compress import stages
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.prune import RULES
from compress.signals import SCORERS, SCORERS_DEFAULT
from compress.stages import Calibration, StageReport, Workspace

STAGE = stages.get("prune_blocks")
TEXT = Calibration(sequences=3, length=64)
BLOCKS = 6
BUDGET: dict[str, Any] = {"drop": None, "budget": {"parameters": 0.2}}


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
    removed = report.metrics["removed"]["block"]
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
    signals = metrics["signals"]["block"]
    lowest = sorted((2, 3, 4), key=lambda block: signals["scores"][scorer][block])[:2]
    assert metrics["removed"] == {"block": sorted(lowest)}
    assert set(signals["scores"]) == set(SCORERS_DEFAULT)
    assert len(signals["agreement"]) == 6
    for each in metrics["candidates"]:
        assert each["removed"] == {"block": sorted(signals["orders"][each["rule"]][:2])}
    first, second = sorted(lowest)
    assert report.summary == f"blocks {first}, {second} of 6 removed, chosen by {scorer}"


def test_the_report_has_its_agreed_form(tiny_llama: Path, tmp_path: Path) -> None:
    """The card and the HTML report read this."""
    source = room.open(tiny_llama)
    pruned, report = prune(tiny_llama, tmp_path / "out")
    metrics = json.loads(report.model_dump_json())["metrics"]
    signals, stability = metrics.pop("signals"), metrics.pop("stability")
    removed = metrics["removed"]
    assert set(signals) == {"block"}
    summary = signals["block"]
    assert set(summary) == {
        *("blocks", "sequences", "scores", "standard_errors", "orders", "agreement"),
        *("protected", "sink_writers"),
    }
    assert (summary["blocks"], summary["sequences"], summary["protected"]) == (6, 3, [0, 1, 5])
    assert set(stability) == {"same_choice", "ranks"}
    assert 0 < stability["same_choice"] <= 1
    assert [ranks is None for ranks in stability["ranks"]] == [True, True, *[False] * 3, True]
    orders = summary["orders"]
    assert metrics == {
        "granularity": "block",
        "blocks": 6,
        "removed": {"block": sorted(orders["knn_entropy"][:2])},
        "candidates": [
            {"rule": rule, "removed": {"block": sorted(orders[rule][:2])}, "kl": None}
            for rule in SCORERS_DEFAULT
        ],
        "search": None,
        "budget": {"measure": "drops", "asked": 2, "reached": 2},
        "healing": None,
        "bytes_in": sum(info.nbytes for info in source.tensor_infos().values()),
        "bytes_out": sum(info.nbytes for info in pruned.tensor_infos().values()),
        "stale_patterns": [],
    }
    assert metrics["removed"] == removed
    assert STAGE.Config(**report.config) == config()


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
    assert report.metrics["removed"] == {"block": [0, 1, 5]}


def test_a_coded_checkpoint_is_pruned_and_comes_out_dense(
    tiny_llama: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    encode = stages.get("encode_weights")
    coded, _ = encode.run(
        room.open(tiny_llama), encode.Config(), Workspace(tmp_path / "coded", TEXT)
    )
    planned = STAGE.plan(coded, config(), TEXT)
    plain = STAGE.plan(room.open(tiny_llama), config(), TEXT)
    assert (planned.nbytes, planned.changes) == (plain.nbytes, plain.changes)
    assert planned.outcome is not None
    assert not planned.outcome.coded
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
        ({"drop": 1, "protect": [0, 1, 2, 3, 4, 5]}, {}, "cannot remove 1 of 6 blocks, 6 of them"),
        ({"scorer": "last_k", "search": "iterative"}, {}, "'last_k' has no scores to take anew"),
        ({"scorer": "random", "search": "iterative"}, {}, "'random' has no scores to take anew"),
        (
            {"search": "evolutionary", "evolution": {"survivors": [2, 2]}},
            {},
            r"these stages make no selection, got offspring 32, survivors \(2, 2\)",
        ),
        ({"evolution": {"tokens": [64, 64]}}, {}, "these stages make no selection"),
        ({"evolution": {"tokens": [64]}}, {}, "as many survivors as tokens"),
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
        for options in ({}, BUDGET, {**BUDGET, "granularity": "mlp"}):
            if "block_scales" in extra and "granularity" in options:
                continue  # its blocks keep their places
            with pytest.raises(BadInput, match=message) as caught:
                STAGE.plan(room.open(tmp_path), config(**options), TEXT)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 0}, "greater than or equal to 1"),
        ({"drop": -1}, "greater than or equal to 1"),
        ({"drpo": 1}, "drpo"),
        ({"drop": None}, "either drop or budget"),
        ({"budget": {"flops": 0.1}}, "either drop or budget"),
        ({"drop": None, "budget": {}}, "a budget is one of parameters, flops and coded_bytes"),
        ({"drop": None, "budget": {"flops": None}}, "a budget is one of"),
        ({"drop": None, "budget": {"flops": 0.1, "parameters": 0.1}}, "a budget is one of"),
        ({"drop": None, "budget": {"flops": 0}}, "greater than 0"),
        ({"drop": None, "budget": {"flops": 1}}, "less than 1"),
        ({"drop": None, "budget": {"flop": 0.1}}, "flop"),
        ({"drop": None, "budget": {"flops": "nan"}}, "finite"),
        ({"scorer": "entropy"}, "'entropy' is not known, did you mean '[a-z]+_entropy'"),
        ({"scorer": "cosin"}, "'cosin' is not known, did you mean 'cosine'"),
        ({"scorer": "leave_one_out"}, "did you mean 'leave_one_out_kl'"),
        ({"search": "greed"}, "'greed' is not known, did you mean 'greedy'"),
        ({"granularity": "blocks"}, "'block', 'attention', 'mlp' or 'joint'"),
        ({"evolution": {"swaps": 0}}, "greater than or equal to 1"),
        ({"evolution": {"generations": -1}}, "greater than or equal to 0"),
        ({"evolution": {"seed": 1}}, "seed"),
        ({"protect": [-1]}, "greater than or equal to 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**options)
    with pytest.raises(BadInput, match=message) as caught:
        recipes.parse({"version": 1, "stages": [{"prune_blocks": {"drop": 2, **options}}]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"drop": None, "budget": {"coded_bytes": 0.1}}])
def test_a_recipe_says_what_it_was_read_as(options: dict[str, Any]) -> None:
    stage = {"prune_blocks": {"drop": 2, **options}}
    recipe = recipes.parse({"version": 1, "stages": [stage]})
    assert recipes.parse(recipe.resolved()) == recipe


def test_a_model_of_one_block_is_left_alone(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    make_llama(tmp_path, num_hidden_layers=1)
    for options in ({"drop": 1}, BUDGET):
        with pytest.raises(BadInput, match="cannot remove 1 of 1 blocks"):
            STAGE.plan(room.open(tmp_path), config(**options), TEXT)
        with pytest.raises(BadInput, match="cannot remove 1 of 1 blocks, 0 of them protected"):
            STAGE.plan(room.open(tmp_path), config(**options, protect=[]), TEXT)


def test_a_model_without_a_tokenizer(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BadInput, match="no tokenizer"):
        prune(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_prunes(rule: str, tiny_llama: Path, tmp_path: Path) -> None:
    _, report = prune(tiny_llama, tmp_path / "out", scorer=rule, drop=1)
    [block] = report.metrics["removed"]["block"]
    assert block in (2, 3, 4)
    assert report.summary == f"blocks {block} of 6 removed, chosen by {rule}"
    assert {"rule": rule, "removed": {"block": [block]}, "kl": None} in report.metrics["candidates"]
    assert (report.metrics["stability"] is None) == (rule not in SCORERS)
