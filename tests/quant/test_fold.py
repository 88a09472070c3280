"""Column folding: the model computes what it did, and every linear layer is accounted for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress import checkpoint
from compress.checkpoint import TensorInfo
from compress.errors import BadInput
from compress.quant.activations import fake_quant_tokens
from compress.quant.fold import Fold, plan_fold
from compress.quant.moments import linear_modules, measure_moments, over_inputs

TOKENS = torch.arange(120).view(2, 60) * 7 % 97
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
NEOX = {"query_key_value", "dense_h_to_4h", "lm_head"}
# What is folded, by the last name of the layer.
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, LLAMA),
    "qwen3": ({"head_dim": 8}, LLAMA),
    "phi3": ({}, {"qkv_proj", "gate_up_proj", "lm_head"}),
    "gemma2": ({"head_dim": 8, "sliding_window": 8}, LLAMA),
    "gpt_neox": ({}, NEOX),
    "phi": ({}, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "lm_head"}),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "lm_head"},
    ),
    "olmo2": ({}, {"o_proj", "down_proj", "lm_head"}),
    "olmo": ({}, {"o_proj", "down_proj"}),
    "mixtral": ({"num_local_experts": 4}, {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}),
    "granite": ({"residual_multiplier": 0.5, "logits_scaling": 2.0}, LLAMA),
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head"},
    ),
    "bert": ({"is_decoder": True}, {"dense", "decoder"}),  # the head's
}
FAST = ("llama", "gemma2", "opt", "qwen2_moe")
QUERY, OUT = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qo")


def make(family: str, **options: Any) -> Any:
    """A random float32 model some of whose columns are large."""
    torch.manual_seed(0)
    settings = {**COMMON, **options}
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape).exp() * 0.5
    return model


def infos_of(model: Any, dtype: str = "F32") -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, dtype, tuple(tensor.shape), 0, "model.safetensors", False, 0)
        for name, tensor in model.state_dict().items()
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0].double()


def folded(model: Any, fold: Fold) -> torch.Tensor:
    """Its logits with every tensor as `Fold.apply` gives it."""
    tensors = {name: fold.apply(name, value) for name, value in model.state_dict().items()}
    model.load_state_dict(tensors)
    return logits(model)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_a_folded_model_computes_the_same(family: str) -> None:
    options, names = FAMILIES[family]
    model = make(family, **options)
    moments, before = measure_moments(model, TOKENS), logits(model)
    fold = plan_fold(model, moments, infos_of(model))
    assert torch.equal(logits(model), before)
    assert {name.split(".")[-2] for name in fold.columns} == names
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {f"{name}.weight" for name in linears} == {*fold.columns, *fold.skipped}
    assert not set(fold.columns) & set(fold.skipped)
    assert all(fold.skipped.values())
    assert distance(folded(model, fold), before) < 2e-6
    after = measure_moments(model, TOKENS)
    for name, s in fold.columns.items():
        assert torch.allclose(after[name].peak, moments[name].peak / s, rtol=1e-3)
        assert float(s.log().std()) > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_norms_in_16_bits_are_made_up_for(family: str) -> None:
    model = make(family, head_dim=8).bfloat16().float()
    moments, before = measure_moments(model, TOKENS), logits(model)
    fold = plan_fold(model, moments, infos_of(model, "BF16"))
    assert all(vector.dtype == torch.bfloat16 for vector in fold.vectors.values())
    assert distance(folded(model, fold), before) < 2e-6


def test_a_file_is_folded_tensor_by_tensor(tiny_llama: Path) -> None:
    source = checkpoint.open(tiny_llama)
    model = source.load_model(dtype=torch.float32)
    before = logits(model)
    fold = plan_fold(model, measure_moments(model, TOKENS), source.tensor_infos())
    new = {}
    for name in source.tensor_infos():
        old = source.read(name)
        new[name] = fold.apply(name, old)
        changed = name != "model.embed_tokens.weight"
        assert (new[name] is not old) == changed
        assert new[name].dtype == (torch.float32 if changed and old.ndim == 2 else torch.bfloat16)
    model.load_state_dict(new)
    assert distance(logits(model), before) < 2e-6


def test_scales_are_those_of_the_formula() -> None:
    model = make("llama")
    moments = measure_moments(model, TOKENS)
    moments[QUERY].peak[4] = 0.0
    for name in ("k", "v"):
        other = QUERY.replace("q_proj", f"{name}_proj")
        moments[other].peak[4] = 0.0
        moments[other].peak[:] *= 0.5  # the largest of the readers counts
    for alpha in (0.5, 0.15):
        fold = plan_fold(model, moments, infos_of(model), alpha=alpha)
        alive = torch.arange(32) != 4
        c = moments[QUERY].peak[alive].pow(1 - alpha)
        expected = c / c.log().mean().exp()
        assert torch.allclose(fold.columns[QUERY][alive], expected, rtol=1e-6)
        assert float(fold.columns[QUERY][4]) == 1.0
        heads = fold.columns[OUT].view(2, 2, 8)  # value heads, their readers, channels
        assert torch.equal(heads[:, 0], heads[:, 1])
        largest = moments[OUT].peak.view(2, 2, 8).amax(1).flatten().pow(1 - alpha)
        expected = largest / largest.log().mean().exp()
        assert torch.allclose(heads[:, 0].flatten(), expected, rtol=1e-6)
        assert torch.equal(fold.rows[QUERY.replace("q_proj", "v_proj")], heads[:, 0].flatten())
    ones = plan_fold(model, moments, infos_of(model), alpha=1.0).columns
    assert all(torch.allclose(s, torch.ones_like(s), rtol=1e-6) for s in ones.values())
    with pytest.raises(BadInput, match="alpha"):
        plan_fold(model, moments, infos_of(model), alpha=-0.1)


class Squared(torch.nn.Module):
    """A norm that squares its weight."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * self.weight**2


def test_reasons_are_given() -> None:
    model = make("llama", tie_word_embeddings=True)
    first, second = model.model.layers
    first.input_layernorm = Squared(first.input_layernorm.weight)
    second.spare = torch.nn.Linear(32, 32)
    moments, infos = measure_moments(model, TOKENS), infos_of(model)
    del infos["model.layers.0.mlp.down_proj.weight"]
    del moments["model.layers.1.mlp.down_proj.weight"]
    skipped = plan_fold(model, moments, infos).skipped
    layer = "model.layers.0"
    unknown = f"reads a norm that uses its weight in an unknown way: {layer}.input_layernorm"
    beside = "a layer beside it did not run"
    down = f"{layer}.mlp.down_proj.weight"
    assert skipped == {
        "lm_head.weight": "shares a weight with another layer",
        **{f"{layer}.self_attn.{part}_proj.weight": unknown for part in "qkv"},
        down: f"{down} is not stored under its own name",
        **{f"model.layers.1.self_attn.{part}_proj.weight": beside for part in "qkv"},
        **{f"model.layers.1.mlp.{part}_proj.weight": beside for part in ("gate", "up")},
        "model.layers.1.mlp.down_proj.weight": "has no moments",
        "model.layers.1.spare.weight": "did not run",
    }


def test_other_readers_and_what_is_not_linear_are_found_out() -> None:
    moe = FAMILIES["qwen2_moe"][0]
    skipped = plan_fold(model := make("qwen2_moe", **moe), {}, infos_of(model)).skipped
    expert = "model.layers.0.mlp.shared_expert"
    assert skipped[f"{expert}.gate_proj.weight"] == "something else reads its norm, too"
    skipped = plan_fold(model := make("phi"), {}, infos_of(model)).skipped
    reason = "what is between it and the layers before it is not linear"
    assert skipped["model.layers.0.mlp.fc2.weight"] == reason


def noise(model: Any) -> dict[str, float]:
    """By layer, how far its outputs are from what they were when its inputs are in 8 bits."""
    layers = linear_modules(model)
    layer_noise: dict[str, float] = {}

    def measure(name: str, x: torch.Tensor) -> float:
        layer = layers[name].weight
        layer_noise[name] = distance(fake_quant_tokens(x) @ layer.T, x @ layer.T)
        return 0.0

    over_inputs(model, TOKENS[:1], measure)
    return layer_noise


def test_rounding_by_token_loses_less() -> None:
    model = make("llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[7] = 60.0
        layer.mlp.up_proj.weight.data[11] *= 100
    before = noise(model)
    folded(model, plan_fold(model, measure_moments(model, TOKENS), infos_of(model)))
    after = noise(model)
    assert all(after[name] < 1.1 * before[name] for name in before)
    large = [name for name in before if re.search("(q|k|v|down)_proj", name)]
    assert all(after[name] < 0.6 * before[name] for name in large)
