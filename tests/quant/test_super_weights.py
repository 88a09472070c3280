from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.quant.super_weights import super_weights

TOKENS = torch.arange(1, 61).view(2, 30)


def load(directory: Path) -> Any:
    return checkpoint.open(directory).load_model(dtype=torch.float32)


def spike_input(model: Any, block: int, size: float) -> int:
    """Make one input of a block's down projection large for some tokens; returns which."""
    with torch.no_grad():
        mlp = model.model.layers[block].mlp
        mlp.gate_proj.weight[5] *= size
        mlp.up_proj.weight[5] *= size
    return 5


def name(block: int) -> str:
    return f"model.layers.{block}.mlp.down_proj.weight"


def test_a_random_model_has_none(tiny_llama: Path) -> None:
    assert super_weights(load(tiny_llama), TOKENS) == []


@pytest.mark.parametrize("block", [0, 2])
def test_the_matrix_with_a_super_weight_is_found(tiny_llama: Path, block: int) -> None:
    model = load(tiny_llama)
    column = spike_input(model, block, 40)
    with torch.no_grad():
        model.model.layers[block].mlp.down_proj.weight[9, column] = 3.0
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert super_weights(model, TOKENS) == [name(block)]
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_a_spike_of_the_input_alone_is_none(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    column = spike_input(model, 1, 40)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()[9, column] = 1e-4
    assert super_weights(model, TOKENS) == []


def test_a_spike_of_the_output_alone_is_none(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[9, 5] = 1000
    assert super_weights(model, TOKENS) == []


def test_a_spike_that_many_weights_make_is_none(tiny_llama: Path) -> None:
    """Large inputs and outputs, but no single product makes the output."""
    model = load(tiny_llama)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight *= 30
        mlp.up_proj.weight *= 30
        mlp.down_proj.weight.copy_(mlp.down_proj.weight.abs())
    assert super_weights(model, TOKENS) == []


def test_a_model_without_a_known_down_projection_is_refused(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(make_llama(tmp_path / "model"))
    for block in model.model.layers:
        block.mlp.down_proj = torch.nn.Sequential(block.mlp.down_proj)
    with pytest.raises(BadInput, match="LlamaForCausalLM: no down projection"):
        super_weights(model, TOKENS)
