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


def test_coded_weights_cannot_be_cast(tiny_llama: Path, tmp_path: Path) -> None:
    encode = stages.get("encode_weights")
    coded, _ = encode.run(checkpoint.open(tiny_llama), encode.Config(), Workspace(tmp_path / "c"))
    with pytest.raises(BadInput, match="cannot be cast"):
        STAGE.plan(coded, STAGE.Config(dtype="float16"), Calibration())
