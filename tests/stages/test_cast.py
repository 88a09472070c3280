from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress import checkpoint, stages
from compress.errors import BadInput
from compress.stages import Calibration, Workspace

STAGE = stages.get("cast")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_weight_is_rounded_as_torch_rounds(
    tiny_llama: Path, tmp_path: Path, dtype: str
) -> None:
    original = checkpoint.open(tiny_llama)
    config = STAGE.Config(dtype=dtype)
    estimate = STAGE.plan(original, config, Calibration())
    done, report = STAGE.run(original, config, Workspace(tmp_path / "cast"))
    infos = done.tensor_infos()
    assert estimate.nbytes == sum(info.nbytes for info in infos.values())
    assert estimate.nbytes == report.metrics["bytes_out"]
    assert done.config["dtype"] == dtype
    for name in original.tensor_infos():
        assert torch.equal(done.read(name), original.read(name).to(getattr(torch, dtype)))


def test_integers_stay_and_nested_configs_follow(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    values = torch.tensor([float("nan"), float("inf"), -0.0, 1 + 2**-9, 3e38])
    save_file({"w": values, "ids": torch.arange(5)}, tmp_path / "model.safetensors")
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "layers": 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done, _ = STAGE.run(
        checkpoint.open(tmp_path), STAGE.Config(dtype="bfloat16"), Workspace(tmp_path / "cast")
    )
    assert torch.equal(done.read("ids"), torch.arange(5))
    rounded = values.bfloat16()
    assert torch.equal(done.read("w").view(torch.int16), rounded.view(torch.int16))
    assert done.config == {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "layers": 3},
    }


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (70000.0, "float16", r"got a magnitude of 70000, .*65504; choose bfloat16"),
        (3.4e38, "bfloat16", r"got a magnitude of 3\.4e\+38, .*keep the dtype it has"),
    ],
)
def test_a_weight_that_would_become_infinite_is_named(
    value: float, dtype: str, message: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    values = torch.tensor([1.0, float("inf"), 0.99 * value, -value, float("nan")])
    save_file({"a": values[:2].clone(), "w": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    workspace = Workspace(tmp_path / "cast")
    with pytest.raises(
        BadInput, match=rf"model\.safetensors: w: .*too large for {dtype}, {message}"
    ):
        STAGE.run(checkpoint.open(tmp_path), STAGE.Config(dtype=dtype), workspace)
    assert not (tmp_path / "cast" / "model.safetensors").exists()


def test_the_largest_weight_that_fits_fits(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    values = torch.tensor([65504.0, -65519.0, 1e-9])
    save_file({"w": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    workspace = Workspace(tmp_path / "cast")
    done, _ = STAGE.run(checkpoint.open(tmp_path), STAGE.Config(dtype="float16"), workspace)
    assert done.read("w").tolist() == [65504.0, -65504.0, 0.0]


def test_the_plan_shows_later_stages_what_the_run_will_write(
    tiny_llama_sharded: Path, tmp_path: Path
) -> None:
    original = checkpoint.open(tiny_llama_sharded)
    config = STAGE.Config(dtype="float32")
    outcome = STAGE.plan(original, config, Calibration(), exact=False).outcome
    done, _ = STAGE.run(original, config, Workspace(tmp_path / "cast"))
    assert outcome.config == done.config
    assert outcome.tensor_infos() == done.tensor_infos()
    for name in done.tensor_infos():
        assert b"".join(outcome.chunks(name)) == b"".join(done.chunks(name))


def test_a_null_quantization_config_is_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    for value, known in (("null", True), ('{"quant_method": "awq"}', False)):
        config.write_text(f'{{"quantization_config": {value}}}')
        if known:
            STAGE.plan(checkpoint.open(tmp_path), STAGE.Config(dtype="float16"), Calibration())
        else:
            with pytest.raises(BadInput, match="cannot be cast"):
                STAGE.plan(checkpoint.open(tmp_path), STAGE.Config(dtype="float16"), Calibration())


def test_coded_weights_cannot_be_cast(tiny_llama: Path, tmp_path: Path) -> None:
    encode = stages.get("encode_weights")
    coded, _ = encode.run(checkpoint.open(tiny_llama), encode.Config(), Workspace(tmp_path / "c"))
    with pytest.raises(BadInput, match="cannot be cast"):
        STAGE.plan(coded, STAGE.Config(dtype="float16"), Calibration())
