from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compress import pipeline
from compress.evaluate.inspect import inspect, kind


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.bfloat16, 8), (torch.float16, 5), (torch.float32, 8), (torch.float8_e4m3fn, 4)],
)
def test_the_entropy_is_that_of_the_exponent_field(
    tmp_path: Path, dtype: torch.dtype, bits: int
) -> None:
    smallest = {5: -14, 4: -6}.get(bits, -100)
    powers = torch.tensor([2.0 ** (smallest + 1 + i % 4) for i in range(1024)])
    model = save(tmp_path / "m", {"a.weight": (powers * 1.5).to(dtype)})
    [row] = inspect(model).dtypes
    assert row.exponent_bits == pytest.approx(2.0)
    assert row.weights == 1024
    assert row.bits_per_weight == 8 * row.stored_nbytes / 1024


def test_a_constant_has_no_entropy_and_integers_have_no_exponent(tmp_path: Path) -> None:
    model = save(tmp_path / "m", {"a.weight": torch.ones(9), "ids": torch.arange(4)})
    rows = {row.group: row for row in inspect(model).dtypes}
    assert rows["F32"].exponent_bits == 0
    assert rows["I64"].exponent_bits is None


def test_it_looks_the_same_coded_but_for_the_size(tiny_llama: Path, tmp_path: Path) -> None:
    pipeline.run("lossless.yaml", tiny_llama, tmp_path / "out")
    dense, coded = inspect(tiny_llama), inspect(tmp_path / "out")
    assert (dense.coded, coded.coded) == (False, True)
    for before, after in zip(dense.kinds, coded.kinds, strict=True):
        assert (before.group, before.nbytes) == (after.group, after.nbytes)
        assert before.exponent_bits == after.exponent_bits
    assert dense.total.bits_per_weight == 16
    assert coded.total.bits_per_weight < 16
    files = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert coded.file_nbytes == files
    assert dense.manifest is None
    assert coded.manifest is not None
    assert coded.manifest["class"] == "lossless"
    assert inspect(tiny_llama, entropy=False).total.exponent_bits is None


def test_the_mean_is_over_weights(tmp_path: Path) -> None:
    mixed = torch.from_numpy(np.where(np.arange(300) % 2, 1.0, 2.0).astype(np.float32))
    model = save(tmp_path / "m", {"a.weight": mixed, "b.weight": torch.ones(100)})
    assert inspect(model).total.exponent_bits == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", "experts.up_proj"),
        ("lm_head.weight", "lm_head"),
        ("scale", "scale"),
    ],
)
def test_kinds(name: str, expected: str) -> None:
    assert kind(name) == expected
