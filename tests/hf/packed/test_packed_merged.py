"""Query, key and value in one product: each part given once, and only of the very same input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.hf.packed import merged
from compress.hf.packed.merged import MergedLinear

pytestmark = pytest.mark.slow  # the emulator is built
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Pack = Callable[..., Any]


def build(family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **options})
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def attention(model: Any) -> Any:
    return model.model.layers[0].self_attn


@pytest.fixture(params=["llama", "qwen2"])  # without biases, with
def both(request: pytest.FixtureRequest, gpu: list[str], pack_model: Pack) -> tuple[Any, Any]:
    """A model packed for fused products, and the same merged."""
    apart = pack_model(build(request.param), "fast", "weights")
    for name, parameter in apart.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    together = copy.deepcopy(apart)
    assert merged.merge(together) == 2
    gpu.clear()
    return apart, together


def launches(gpu: list[str]) -> int:
    return sum(name.startswith("linear") for name in gpu)


@torch.no_grad()
def test_one_launch_gives_what_each_gives(both: tuple[Any, Any], gpu: list[str]) -> None:
    x = torch.randn(1, 3, 64).bfloat16()
    for part, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        apart, together = (getattr(model.model.layers[0], part) for model in both)
        expected = [getattr(apart, f"{name}_proj")(x) for name in names]
        gpu.clear()
        found = [getattr(together, f"{name}_proj")(x) for name in names]
        assert launches(gpu) == 1
        for one, other in zip(found, expected, strict=True):
            assert one.is_contiguous()
            assert torch.equal(one, other)
        assert together.get_submodule(f"{names[0]}_proj").group.last is None  # nothing is held


@torch.no_grad()
def test_whole_models_agree(both: tuple[Any, Any], gpu: list[str]) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    apart, together = (model(ids).logits for model in both)
    assert torch.equal(apart, together)
    assert launches(gpu) == (7 + 1) + (4 + 1)


@torch.no_grad()
def test_another_input_is_never_mistaken(both: tuple[Any, Any], gpu: list[str]) -> None:
    apart, together = map(attention, both)
    x = torch.randn(2, 64).bfloat16()
    together.q_proj(x)
    assert torch.equal(together.q_proj(x), apart.q_proj(x))  # asked for twice
    x += 1  # the same object, changed in place
    assert torch.equal(together.k_proj(x), apart.k_proj(x))


@torch.no_grad()
def test_cross_attention_is_taken_apart(both: tuple[Any, Any], gpu: list[str]) -> None:
    apart, together = map(attention, both)
    x, other = torch.randn(2, 2, 64).bfloat16()
    for _ in range(2):
        gpu.clear()
        for name, given in (("q_proj", x), ("k_proj", other), ("v_proj", other)):
            assert torch.equal(getattr(together, name)(given), getattr(apart, name)(given))
        assert launches(gpu) == 6  # three of each
    assert together.q_proj.group.last is None


class Switching(torch.Tensor):
    """When its changes are first counted, another thread gets its turn."""

    switch: Callable[[], None] | None = None

    @property
    def _version(self) -> int:
        switch, self.switch = self.switch, None
        if switch:
            switch()
        return 0


@torch.no_grad()
def test_threads_may_share_a_model(both: tuple[Any, Any], gpu: list[str]) -> None:
    apart, together = map(attention, both)
    x, other = torch.randn(2, 2, 64).bfloat16()
    x = x.as_subclass(Switching)
    x.switch = lambda: found.append(together.q_proj(other))
    found: list[torch.Tensor] = []
    found += [getattr(together, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    expected = [apart.q_proj(other)]
    expected += [getattr(apart, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    for one, good in zip(found, expected, strict=True):
        assert torch.equal(one, good)


def test_each_computes_its_own_where_products_are_not_fused(
    both: tuple[Any, Any], gpu: list[str]
) -> None:
    apart, together = map(attention, both)
    many = torch.randn(9, 64).bfloat16()
    assert torch.equal(together.v_proj(many), apart.v_proj(many))
    grads = []
    for module in (apart, together):
        x = torch.ones(2, 64).bfloat16().requires_grad_()
        sum(projection(x).sum() for projection in (module.q_proj, module.v_proj)).backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)
    with torch.inference_mode():
        x = torch.ones(2, 64).bfloat16()
        assert torch.equal(together.k_proj(x), apart.k_proj(x))
    assert attention(both[1]).q_proj.group.last is None


def test_the_weights_of_each_are_its_rows(both: tuple[Any, Any]) -> None:
    apart, together = map(attention, both)
    for name in ("q_proj", "k_proj", "v_proj"):
        one, other = getattr(apart, name), getattr(together, name)
        assert isinstance(other, MergedLinear)
        assert other.packed is together.q_proj.packed
        assert other.weight.shape == one.weight.shape
        assert torch.equal(other.dense(), one.dense())
    moved = copy.deepcopy(together)._apply(torch.clone)
    assert moved.k_proj.packed is moved.q_proj.packed
    assert moved.k_proj.group.members[0] is moved.q_proj


def test_what_is_not_merged(gpu: list[str], pack_model: Pack, monkeypatch: Any) -> None:
    odd = build(hidden_size=72, num_attention_heads=3, num_key_value_heads=3)  # 72 rows
    assert merged.merge(pack_model(odd, "fast", "weights")) == 1  # gate and up
    assert merged.merge(pack_model(build(), "fast", "logits")) == 0
    monkeypatch.setattr(merged, "on_gpu", lambda tensor: False)
    assert merged.merge(pack_model(build(), "fast", "weights")) == 0
