"""Experts: one decoded where one is indexed, and the logits of the dense model in every case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import BadInput
from compress.hf.packed import experts, forms, modules

IDS = torch.arange(14).view(2, 7) * 5
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**SIZES, "num_local_experts": 4},
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
}


def build(family: str, **options: Any) -> Any:
    config = AutoConfig.for_model(family, **FAMILIES[family], **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.to(torch.bfloat16).eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dense_model(
    family: str, implementation: str, pack_model: Callable[..., Any]
) -> None:
    dense = build(family)
    if family != "gpt2":
        dense.set_experts_implementation(implementation)
    packed = pack_model(copy.deepcopy(dense))
    held = [name for name, m in packed.named_modules() if isinstance(m, experts.PackedParameters)]
    assert len(held) == (8 if family == "gpt2" else 2)
    assert all(parameter.dim() < 3 for parameter in packed.parameters())
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, dense(IDS).logits)
        assert torch.equal(copy.deepcopy(packed)(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("layout", ["fast", "dense"])
def test_layouts_for_gpus(layout: str, pack_model: Callable[..., Any]) -> None:
    dense = build("mixtral", experts_implementation="eager")
    packed = pack_model(copy.deepcopy(dense), layout)
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, dense(IDS).logits)


def test_only_the_expert_that_is_indexed_is_decoded(
    pack_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = pack_model(build("mixtral")).model.layers[0].mlp.experts
    asked: list[tuple[int, int]] = []
    unpack = modules.unpack

    def noting(packed: torch.Tensor, ints: list[int], first: int, rows: int) -> torch.Tensor:
        asked.append((first, rows))
        return unpack(packed, ints, first, rows)

    monkeypatch.setattr(modules, "unpack", noting)
    assert held.gate_up_proj.shape == (4, 96, 32)
    assert held.gate_up_proj[torch.tensor(2)].shape == (96, 32)
    assert asked == [(192, 96)]
    assert held.down_proj[torch.tensor([3, 1, 3])].shape == (3, 32, 48)
    assert asked[1:] == [(0, 128)]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_reach_what_is_before_the_experts(
    implementation: str, pack_model: Callable[..., Any]
) -> None:
    dense = build("qwen3_moe")
    dense.set_experts_implementation(implementation)
    packed = pack_model(copy.deepcopy(dense))
    for model in (dense, packed):
        model(IDS, labels=IDS).loss.backward()
    expected = dict(dense.named_parameters())
    for name, parameter in packed.named_parameters():
        grad, dense_grad = parameter.grad, expected[name].grad
        assert torch.allclose(grad.float(), dense_grad.float(), rtol=0.05, atol=1e-3), name


def test_a_change_is_never_lost(pack_model: Callable[..., Any]) -> None:
    held = pack_model(build("mixtral")).model.layers[0].mlp.experts
    for change in (
        lambda: held.down_proj[1].add_(1),
        lambda: held.down_proj.data.mul_(2),
        lambda: setattr(held, "down_proj", nn.Parameter(torch.zeros(4, 32, 48))),
        lambda: held.half(),
    ):
        with pytest.raises(BadInput, match="packed weights"):
            change()


def test_what_is_no_expert() -> None:
    assert experts.packable(nn.Conv1d(4, 4, 2)) == []
    assert experts.packable(nn.Linear(4, 4)) == []
    held = build("mixtral").model.layers[0].mlp.experts
    packed = forms.pack(held.down_proj, "stored", smaller=False)
    assert packed is not None
    with pytest.raises(BadInput, match="down: a MixtralExperts cannot hold it packed"):
        experts.adopt(held, {"down": packed})
    with pytest.raises(BadInput, match="gate_up_proj: is another weight"):
        experts.adopt(held, {"gate_up_proj": packed})
    assert isinstance(held.gate_up_proj, nn.Parameter)
