"""Quantization that looks at the model at work: folding, training, a perplexity to keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import compress
from compress import checkpoint as room
from compress import pipeline, stages
from compress import recipe as recipes
from compress.progress import Silent
from compress.signals import windows
from compress.stages import Calibration, StageReport, Workspace

STAGE = stages.get("quantize")
TEXT = Calibration(sequences=4, length=64)
RTN = {"method": "rtn", "bits": 4, "group": "row", "symmetric": True}
TRAINING = {"steps": 6, "batch": 2, "window": 3}


def quantize(model: Path, directory: Path, **options: Any) -> tuple[room.Checkpoint, StageReport]:
    config = STAGE.Config.model_validate(options)
    scratch = directory.with_name(f"{directory.name}-scratch")
    scratch.mkdir(exist_ok=True)
    return STAGE.run(room.open(model), config, Workspace(directory, TEXT, scratch=scratch))


def spiky(directory: Path, make_llama: Callable[..., Path]) -> Path:
    """A model whose norms let a few columns through much larger than the others."""
    model = AutoModelForCausalLM.from_pretrained(make_llama(directory), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[::16] *= 30
    model.save_pretrained(directory)
    return directory


def logits(path: Path) -> torch.Tensor:
    """On text that calibration has not seen."""
    tokens = windows(TEXT.data, room.open(path).tokenizer(), TEXT.sequences + 2, TEXT.length, 0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(tokens[TEXT.sequences :]).logits
    return found


def test_folding_helps_where_columns_are_large(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = spiky(tmp_path / "model", make_llama)
    errors = {}
    for fold in (None, 0.5):
        weights = {"method": "rtn", "bits": 8, "group": "row", "symmetric": True}
        done, report = quantize(
            model, tmp_path / str(fold), weights=weights, activations={"bits": 8, "fold": fold}
        )
        errors[fold] = float((logits(done.path) - logits(model)).square().mean())
        assert ("fold" in report.metrics) == (fold is not None)
    assert errors[0.5] < 0.7 * errors[None]
    found = report.metrics["fold"]
    assert found["layers"] > 0
    assert found["layers"] + len(found["skipped"]) == len(report.metrics["layers"])
    assert "model.norm.weight" in report.changed or "lm_head" in found["skipped"]
    assert "model.layers.0.input_layernorm.weight" in report.changed


def test_layers_that_stay_are_folded_as_well(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """What reads a folded norm and is not quantized must take the scales too."""
    model = spiky(tmp_path / "model", make_llama)
    done, report = quantize(
        model,
        tmp_path / "out",
        weights={"method": "rtn", "bits": 8, "group": "row", "symmetric": True},
        activations={"bits": 8, "fold": 0.5},
        ignore=["*.q_proj"],
    )
    assert "model.layers.2.self_attn.q_proj.weight" in report.changed
    scale = logits(model).square().mean()
    assert (logits(done.path) - logits(model)).square().mean() < 0.01 * scale


def test_training_lowers_the_error_and_is_what_loads(tiny_llama: Path, tmp_path: Path) -> None:
    plain, _ = quantize(tiny_llama, tmp_path / "plain", weights=RTN, activations={})
    done, report = quantize(
        tiny_llama,
        tmp_path / "out",
        weights=RTN,
        activations={},
        training={**TRAINING, "steps": 30},
    )
    found = report.metrics["training"]
    assert found["windows"] == [[0, 3], [3, 6]]
    assert len(found["history"]) == 60
    assert len(found["errors"]) == 2
    target = logits(tiny_llama)

    def far(path: Path) -> float:
        return float((logits(path) - target).square().mean())

    assert far(done.path) < 0.8 * far(plain.path)


@pytest.mark.parametrize("windows", ["entropy", "uniform"])
def test_windows_hold_every_block_once(windows: str, tiny_llama: Path, tmp_path: Path) -> None:
    _, report = quantize(
        tiny_llama,
        tmp_path / "out",
        weights=RTN,
        training={**TRAINING, "steps": 1, "windows": windows},
        ignore=["*.layers.4.*", "lm_head"],
    )
    found = report.metrics["training"]
    blocks = [block for first, last in found["windows"] for block in range(first, last)]
    assert blocks == list(range(6))
    assert ("entropies" in found) == (windows == "entropy")


def test_the_whole_model_is_trained(tiny_llama: Path, tmp_path: Path) -> None:
    _, report = quantize(
        tiny_llama, tmp_path / "out", weights=RTN, training={"mode": "full", "steps": 4, "batch": 2}
    )
    assert report.metrics["training"]["mode"] == "full"
    assert len(report.metrics["training"]["history"]) == 4


def test_trained_codes_of_ecsq_keep_their_rate(tiny_llama: Path, tmp_path: Path) -> None:
    _, report = quantize(
        tiny_llama,
        tmp_path / "out",
        weights={"method": "ecsq", "bits_per_weight": 3.5},
        training=TRAINING,
    )
    assert 3.3 < report.metrics["bits_per_weight"] < 3.55


class Stopping(Silent):
    """Ends the work at the n-th step of training windows."""

    def __init__(self, n: int) -> None:
        self.left, self.training = n, False

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Stopping]:
        self.training = label == "training windows"
        yield self

    def advance(self, amount: int) -> None:
        self.left -= self.training * amount
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_to_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    stage = {"quantize": {"weights": RTN, "training": {**TRAINING, "steps": 3}}}
    calibration = {"sequences": 4, "length": 64}
    recipe = recipes.parse({"version": 1, "calibration": calibration, "stages": [stage]})
    pipeline.run(recipe, tiny_llama, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe, tiny_llama, out, progress=Stopping(4))
    pipeline.run(recipe, tiny_llama, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_perplexity_ratio_is_met(tiny_llama: Path, tmp_path: Path) -> None:
    _, report = quantize(
        tiny_llama, tmp_path / "out", weights={"method": "ecsq", "max_perplexity_ratio": 1.02}
    )
    found = report.metrics["perplexity_search"]
    assert found["ratio"] <= 1.02
    assert len(found["trials"]) > 2
    assert report.metrics["bits_per_weight"] < 8


def test_a_search_meets_the_budget_and_may_leave_units_out(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """At so few bits it pays to drop something; the search says what, and zeros are loaded."""
    search = {"generations": 3, "offspring": 6, "survivors": [1], "tokens": [64]}
    done, report = quantize(
        tiny_llama,
        tmp_path / "out",
        weights={"method": "ecsq", "bits_per_weight": 2.2},
        search=search,
    )
    found = report.metrics["search"]
    assert report.metrics["bits_per_weight"] <= 2.2
    assert found["loss"] <= found["start_loss"]
    assert found["history"] == sorted(found["history"], reverse=True)
    gone = {tuple(unit) for unit in found["dropped"]}
    model = AutoModelForCausalLM.from_pretrained(done.path)
    model(torch.arange(20)[None])
    for kind in ("attention", "mlp"):
        for index, level in enumerate(found["units"][kind]):
            assert (level is None) == ((kind, index) in gone)
            part = "self_attn.o_proj" if kind == "attention" else "mlp.down_proj"
            weight = model.get_submodule(f"model.layers.{index}.{part}").weight
            assert bool(weight.any()) != ((kind, index) in gone)
    stated = done.config.get("per_layer_config", {})
    assert {(kind, int(i)) for i, entry in stated.items() for kind in entry["skip"]} == gone


def test_what_a_search_leaves_out_is_coded_to_nothing(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Of attention that adds next to nothing, which takes its share of the bits all the same."""
    source = make_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source)
    for index in (2, 3, 4):
        model.model.layers[index].self_attn.o_proj.weight.data.mul_(1e-4)
    model.save_pretrained(source)
    weights = {"method": "ecsq", "bits_per_weight": 2.2}
    search = {"generations": 1, "offspring": 6, "survivors": [1], "tokens": [64]}
    recipe = recipes.parse(
        {
            "version": 1,
            "calibration": {"sequences": 4, "length": 64},
            "stages": [{"quantize": {"weights": weights, "search": search}}, "encode_weights"],
        }
    )
    pipeline.run(recipe, source, tmp_path / "out")
    coded = room.open(tmp_path / "out")
    infos = coded.tensor_infos()
    dropped = coded.manifest["stages"][0]["metrics"]["search"]["dropped"]
    assert dropped
    for kind, index in dropped:
        part = "self_attn.q_proj" if kind == "attention" else "mlp.up_proj"
        assert infos[f"model.layers.{index}.{part}.weight_packed"].stored_nbytes < 200
    assert compress.verify(tmp_path / "out", source).ok
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_trained_and_coded_it_loads_in_a_fresh_process(tiny_llama: Path, tmp_path: Path) -> None:
    steps = [
        {
            "quantize": {
                "weights": RTN,
                "activations": {"bits": 8, "fold": 0.5},
                "training": {**TRAINING, "steps": 2, "windows": "entropy"},
            }
        },
        "encode_weights",
    ]
    calibration = {"sequences": 4, "length": 64}
    recipe = recipes.parse({"version": 1, "calibration": calibration, "stages": steps})
    pipeline.run(recipe, tiny_llama, tmp_path / "out")
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
        ({"weights": {"method": "ecsq"}}, "either bits_per_weight or max_perplexity_ratio"),
        (
            {"weights": {"bits_per_weight": 4, "max_perplexity_ratio": 1.1}},
            "either bits_per_weight or max_perplexity_ratio",
        ),
        ({"weights": {"max_perplexity_ratio": 1.0}}, "greater than 1"),
        ({"weights": {**RTN, "symmetric": False}, "training": {}}, "needs symmetric weights"),
        ({"weights": {"method": "nf4"}, "activations": {}}, "nf4 takes no activations"),
        ({"weights": RTN, "search": {}}, "search needs weights.bits_per_weight"),
        ({"weights": RTN, "training": {"kv_bits": 4}}, "kv_bits"),
        ({"weights": RTN, "activations": {"fold": 1.5}}, "less than or equal to 1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        STAGE.Config.model_validate(options)
