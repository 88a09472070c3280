"""Linear weights as integers: what is written, what loads, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress import checkpoint as room
from compress import pipeline, stages
from compress import recipe as recipes
from compress.errors import BadInput
from compress.quant import QTensor, Scheme, linear_names, quantize_ecsq, quantize_rtn
from compress.stages import Calibration, StageReport, Workspace

STAGE = stages.get("quantize")
TEXT = Calibration(sequences=2, length=64)
ECSQ = {"method": "ecsq", "bits_per_weight": 4.5}
RTN = {"method": "rtn", "bits": 4, "group": 32}


def quantize(model: Path, directory: Path, **options: Any) -> tuple[room.Checkpoint, StageReport]:
    config = STAGE.Config.model_validate(options)
    return STAGE.run(room.open(model), config, Workspace(directory, TEXT))


@pytest.mark.parametrize(
    ("weights", "again"),
    [
        (ECSQ, None),
        (RTN, lambda w: quantize_rtn(w, Scheme(4, 16, False), torch.bfloat16)),
        (
            {"method": "rtn", "bits": 8, "group": "row", "symmetric": True},
            lambda w: quantize_rtn(w, Scheme(8, None, True), torch.bfloat16),
        ),
    ],
)
def test_transformers_loads_what_the_codes_stand_for(
    weights: dict[str, Any],
    again: Callable[[torch.Tensor], QTensor] | None,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """MLP columns are 80, which groups of 32 do not divide: 16 do, and 32 the others'."""
    done, report = quantize(tiny_llama, tmp_path / "out", weights=weights)
    source = room.open(tiny_llama)
    names = linear_names(source).weights
    assert sorted(f"{layer}.weight" for layer in report.metrics["layers"]) == sorted(names)
    model = AutoModelForCausalLM.from_pretrained(done.path)
    model(torch.arange(20)[None])  # the first pass unpacks
    for name in names:
        w = source.read(name)
        if again is None:
            c = report.metrics["layers"][name.removesuffix(".weight")]["c"]
            found = quantize_ecsq(w, c, torch.bfloat16).dense(torch.bfloat16)
            spread = (model.get_parameter(name) - found).abs().max()
            assert spread <= 1e-2 * found.abs().max()  # c is rounded in the report
        elif w.shape[1] == 80:
            assert torch.equal(model.get_parameter(name), again(w).dense(torch.bfloat16))


def test_the_rate_is_met_and_nothing_else_changes(tiny_llama: Path, tmp_path: Path) -> None:
    done, report = quantize(tiny_llama, tmp_path / "out", weights=ECSQ)
    metrics = report.metrics
    assert 4.3 < metrics["bits_per_weight"] <= 4.5
    bits = metrics["code_bits"] + metrics["scale_bits"] + metrics["zero_point_bits"]
    assert bits / metrics["weights"] == pytest.approx(metrics["bits_per_weight"], abs=1e-4)
    source = room.open(tiny_llama)
    for name in done.tensor_infos():
        same = name in source.tensor_infos() and torch.equal(done.read(name), source.read(name))
        assert same != (name in report.changed)


def test_large_inputs_earn_finer_steps(tiny_llama: Path, tmp_path: Path) -> None:
    _, plain = quantize(tiny_llama, tmp_path / "plain", weights=ECSQ)
    _, report = quantize(tiny_llama, tmp_path / "out", weights={**ECSQ, "sensitivity": True})
    layers = report.metrics["layers"]
    assert len({layer["c"] for layer in layers.values()}) > 20
    assert len({layer["c"] for layer in plain.metrics["layers"].values()}) == 1
    assert 4.3 < report.metrics["bits_per_weight"] <= 4.5


def test_the_plan_knows_the_size(tiny_llama: Path, tmp_path: Path) -> None:
    for i, weights in enumerate((ECSQ, RTN)):
        config = STAGE.Config.model_validate({"weights": weights})
        estimate = STAGE.plan(room.open(tiny_llama), config, TEXT)
        done, _ = quantize(tiny_llama, tmp_path / str(i), weights=weights)
        size = sum(info.nbytes for info in done.tensor_infos().values())
        assert estimate.nbytes == pytest.approx(size, rel=0.01)


def test_layers_that_are_ignored_or_tied_are_named(tiny_llama_tied: Path, tmp_path: Path) -> None:
    done, report = quantize(
        tiny_llama_tied, tmp_path / "out", weights=RTN, ignore=["*.layers.0.*", "*.o_proj"]
    )
    skipped = report.metrics["skipped"]
    assert skipped["lm_head"] == "tied to the embeddings"
    assert skipped["model.layers.0.mlp.up_proj"] == "ignored by the recipe"
    assert sum("o_proj" in name for name in skipped) == 6
    assert not set(skipped) & set(report.metrics["layers"])
    stated = json.loads((done.path / "config.json").read_text())["quantization_config"]
    assert set(skipped) <= set(stated["ignore"])


def test_through_a_recipe_coded_verified_and_decompressed(tiny_llama: Path, tmp_path: Path) -> None:
    steps = [{"quantize": {"weights": ECSQ}}, "encode_weights"]
    recipe = recipes.parse({"version": 1, "stages": steps})
    result = pipeline.run(recipe, tiny_llama, tmp_path / "out")
    assert result.bytes_out < 0.4 * result.bytes_in
    assert compress.verify(tmp_path / "out", tiny_llama).ok
    compress.decompress(tmp_path / "out", tmp_path / "dense")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "print([A.from_pretrained(p)(torch.arange(30)[None]).logits.view(torch.int16)"
        ".sum().item() for p in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", script, tmp_path / "out", tmp_path / "dense"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"method": "ecsq"}}, "ecsq needs either bits_per_weight"),
        ({"weights": {**ECSQ, "bits": 4}}, "ecsq knows no bits"),
        ({"weights": {**RTN, "rdo": 0.1}}, "rtn knows no rdo"),
        ({"weights": {"method": "rtn", "bits": 9}}, "less than or equal to 8"),
        ({"weights": RTN, "activations": {"bits": 4}}, "should be 8"),
        ({}, "Field required"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        STAGE.Config.model_validate(options)


def test_options_parse_back() -> None:
    for weights in (ECSQ, RTN, {"method": "rtn", "group": "row"}):
        config = STAGE.Config.model_validate({"weights": weights, "activations": {}})
        assert STAGE.Config.model_validate(config.model_dump(mode="json")) == config


def test_what_cannot_be_quantized(
    make_llama: Callable[..., Path], tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"so few bits per weight cannot .* got 0\.1, expected"):
        quantize(tiny_llama, tmp_path / "few", weights={"bits_per_weight": 0.1})
    with pytest.raises(BadInput, match=r"has no weight to quantize.*ignored by the recipe"):
        quantize(tiny_llama, tmp_path / "none", weights=RTN, ignore=["*"])
    done, _ = quantize(tiny_llama, tmp_path / "once", weights=RTN)
    with pytest.raises(BadInput, match="already quantized by compressed-tensors"):
        quantize(done.path, tmp_path / "twice", weights=RTN)
    model = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "nan"))
    model.model.layers[3].mlp.up_proj.weight.data[5, 7] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(BadInput, match=r"layers\.3\.mlp\.up_proj\.weight, row 5: holds NaN"):
        quantize(tmp_path / "nan", tmp_path / "out", weights=ECSQ)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_whose_weights_are_renamed_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """One layer that is stored by its own name would be all that is quantized."""
    tensors = load_file(tiny_llama / "model.safetensors")
    shutil.copytree(tiny_llama, tmp_path / "model")
    renamed = {name.replace("model.layers", "model.blocks"): t for name, t in tensors.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"under other names, got 42 of 43, as model\.layers\.0"):
        quantize(tmp_path / "model", tmp_path / "out", weights=RTN)


def test_a_text_that_is_needed_and_not_there(tiny_llama: Path) -> None:
    nowhere = TEXT.model_copy(update={"data": "no.txt"})
    for option in ("sensitivity", "super_weights"):
        config = STAGE.Config.model_validate({"weights": {**ECSQ, option: True}})
        with pytest.raises(BadInput, match=r"no\.txt: no such file"):
            STAGE.plan(room.open(tiny_llama), config, nowhere)
    plain = STAGE.Config.model_validate({"weights": ECSQ})
    assert STAGE.plan(room.open(tiny_llama), plain, nowhere).nbytes


@pytest.mark.parametrize("weights", [{"method": "nf4", "double_quant": True}, {"method": "int8"}])
def test_bitsandbytes_through_a_recipe(
    weights: dict[str, Any], make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Loaded in plain transformers; MLPs of 80 columns stay where NF4 does not take them."""
    pytest.importorskip("bitsandbytes")
    model = make_llama(tmp_path / "model")
    recipe = recipes.parse({"version": 1, "stages": [{"quantize": {"weights": weights}}]})
    planned = pipeline.plan(recipe, model)
    result = pipeline.run(recipe, model, tmp_path / "out")
    metrics = result.manifest["stages"][0]["metrics"]
    assert metrics["format"] == "bitsandbytes"
    down = "model.layers.0.mlp.down_proj"
    assert (down in metrics["skipped"]) == (weights["method"] == "nf4")
    assert planned.stages[-1].nbytes == pytest.approx(result.bytes_out, rel=0.02)
    assert compress.verify(tmp_path / "out", model).ok
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(20)[None]).logits
    whole = AutoModelForCausalLM.from_pretrained(model)(torch.arange(20)[None]).logits
    assert 0 < (found.float() - whole.float()).abs().max() < 0.5 * whole.float().abs().max()
    coded = recipes.parse({"version": 1, "stages": ["encode_weights"]})
    with pytest.raises(BadInput, match="bitsandbytes"):
        pipeline.run(coded, tmp_path / "out", tmp_path / "coded")
