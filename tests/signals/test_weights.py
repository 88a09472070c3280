from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress import checkpoint as room
from compress.checkpoint import Checkpoint
from compress.signals import measure_weights


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Checkpoint]:
    def write(**tensors: torch.Tensor) -> Checkpoint:
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        return room.open(tmp_path)

    return write


def entropy(symbols: list[int]) -> float:
    counts = Counter(symbols)
    return -sum(n / len(symbols) * math.log2(n / len(symbols)) for n in counts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exponents_are_those_that_frexp_finds(
    save: Callable[..., Checkpoint], dtype: torch.dtype
) -> None:
    weights = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).add(3).to(dtype)
    [found] = measure_weights(save(w=weights))
    exponents = torch.frexp(weights.double()).exponent.flatten().tolist()
    assert (found.name, found.symbol, found.weights) == ("w", "exponent", 1500)
    assert found.bits == pytest.approx(entropy(exponents))


def test_integers_are_counted_by_bytes(save: Callable[..., Checkpoint]) -> None:
    codes = torch.arange(512, dtype=torch.int16) % 5
    [found] = measure_weights(save(w=codes))
    data = [byte for code in codes.tolist() for byte in code.to_bytes(2, "little")]
    assert (found.dtype, found.symbol, found.weights) == ("I16", "byte", 512)
    assert found.bits == pytest.approx(entropy(data))


def test_constant_and_empty_tensors_carry_nothing(save: Callable[..., Checkpoint]) -> None:
    found = measure_weights(save(a=torch.ones(9), b=torch.zeros(0, 3)))
    assert [tensor.bits for tensor in found] == [0, 0]
    assert [tensor.weights for tensor in found] == [9, 0]
