"""Column by column moments of linear layers' inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.quant.moments import Moments, measure_moments

TOKENS = torch.arange(180).view(3, 60) * 7 % 250


def load(directory: Path) -> Any:
    return checkpoint.open(directory).load_model(dtype=torch.float32)


def same(one: dict[str, Moments], other: dict[str, Moments]) -> bool:
    return list(one) == list(other) and all(
        one[name].tokens == other[name].tokens
        and torch.equal(one[name].peak, other[name].peak)
        and torch.equal(one[name].squares, other[name].squares)
        for name in one
    )


def test_moments_are_those_of_the_inputs(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    found = measure_moments(model, TOKENS)
    assert set(found) == {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    inputs: dict[str, torch.Tensor] = {}
    for name in ("model.layers.2.mlp.down_proj", "lm_head"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
        )
    with torch.no_grad():
        model(TOKENS)
    for name, x in inputs.items():
        moments = found[f"{name}.weight"]
        assert moments.tokens == TOKENS.numel()
        assert moments.peak.dtype == moments.squares.dtype == torch.float64
        assert torch.allclose(moments.peak, x.abs().amax(0).double(), rtol=1e-4)
        assert torch.allclose(moments.mean_square, x.double().square().mean(0), rtol=1e-4)


def test_parts_add_up_and_threads_change_nothing(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    whole = measure_moments(model, TOKENS)
    first, rest = measure_moments(model, TOKENS[:1]), measure_moments(model, TOKENS[1:2])
    last = measure_moments(model, TOKENS[2:])
    assert same({name: first[name] + rest[name] + last[name] for name in first}, whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert same(measure_moments(model, TOKENS), whole)
    finally:
        torch.set_num_threads(threads)


def test_only_the_layers_asked_for_and_no_hook_stays(tiny_llama_tied: Path) -> None:
    model = load(tiny_llama_tied)
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert sorted(measure_moments(model, TOKENS, layers=names)) == sorted(names)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_measured_is_named(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    with pytest.raises(BadInput, match=r"up_prj.*did you mean.*up_proj"):
        measure_moments(model, TOKENS, layers=["model.layers.1.mlp.up_prj.weight"])
    model.model.layers[3].input_layernorm.weight.data[5] = torch.nan
    with pytest.raises(BadInput, match=r"layers\.3\.self_attn\.q_proj.*not finite"):
        measure_moments(model, TOKENS)
