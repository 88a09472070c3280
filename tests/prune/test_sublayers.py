"""Where attention and MLP are in many families, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import BadInput
from compress.prune import find_sublayers, find_units, output_without
from compress.signals import find_blocks

SEQUENTIAL = (("self_attn",), ("mlp",))
PRE_NORMS = (("input_layernorm",), ("post_attention_layernorm",))
NO_NORMS = ((), ())
# modules, norms before, norms after, topology, output projections
LLAMA = (*SEQUENTIAL, *PRE_NORMS, *NO_NORMS, "sequential", {"o_proj", "down_proj"})
STRUCTURES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite"),
            *("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"),
        ),
        LLAMA,
    ),
    "llama4_text": (("self_attn",), ("feed_forward",), *LLAMA[2:]),
    "gemma2": (
        *SEQUENTIAL,
        *(("input_layernorm",), ("pre_feedforward_layernorm",)),
        *(("post_attention_layernorm",), ("post_feedforward_layernorm",)),
        *LLAMA[6:],
    ),
    "afmoe": (
        *SEQUENTIAL,
        *(("input_layernorm",), ("pre_mlp_layernorm",)),
        *(("post_attention_layernorm",), ("post_mlp_layernorm",)),
        *LLAMA[6:],
    ),
    "olmo2": (
        *SEQUENTIAL,
        *NO_NORMS,
        *(("post_attention_layernorm",), ("post_feedforward_layernorm",)),
        *LLAMA[6:],
    ),
    "gpt2": (("attn",), ("mlp",), ("ln_1",), ("ln_2",), *NO_NORMS, "sequential", {"c_proj"}),
    "gpt_neox": (
        *(("attention",), ("mlp",)),
        *PRE_NORMS,
        *NO_NORMS,
        "parallel",
        {"dense", "dense_4h_to_h"},
    ),
    "opt": (
        *(("self_attn",), ("fc1", "fc2")),
        *(("self_attn_layer_norm",), ("final_layer_norm",)),
        *NO_NORMS,
        "sequential",
        {"out_proj", "fc2"},
    ),
    "phi": (
        *SEQUENTIAL,
        *(("input_layernorm",), ("input_layernorm",)),
        *NO_NORMS,
        "parallel",
        {"dense", "fc2"},
    ),
    "cohere": (
        *SEQUENTIAL,
        *(("input_layernorm",), ("input_layernorm",)),
        *NO_NORMS,
        "parallel",
        LLAMA[7],
    ),
    "falcon": (
        *(("self_attention",), ("mlp",)),
        *(("input_layernorm",), ("input_layernorm",)),
        *NO_NORMS,
        "parallel",
        {"dense", "dense_4h_to_h"},
    ),
}
STRUCTURES["gemma3_text"] = STRUCTURES["gemma2"]
OPTIONS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
}
FAST = ("llama", "gemma2", "olmo2", "gpt_neox", "opt", "phi")
CASES = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in STRUCTURES]


@pytest.fixture
def make(make_family: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    return lambda family, **options: make_family(
        family, tmp_path / family, **{**OPTIONS.get(family, {}), **options}
    )


@pytest.mark.parametrize("family", CASES)
def test_the_structure_of_a_family(family: str, make: Callable[..., Any]) -> None:
    model = make(family)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases are zero when new
            parameter.data += torch.randn(parameter.shape) / 10
    sublayers = find_sublayers(model)
    assert len(sublayers) == 6
    names = {module: name for name, module in model.named_modules()}
    for block, found in zip(find_blocks(model), sublayers, strict=True):
        full = [tuple(f"{names[block]}.{name}" for name in part) for part in STRUCTURES[family][:6]]
        assert [found.attention.modules, found.mlp.modules] == full[:2]
        assert [found.attention.before, found.mlp.before] == full[2:4]
        assert [found.attention.after, found.mlp.after] == full[4:]
        assert found.topology == STRUCTURES[family][6]
        outputs = (*found.attention.outputs, *found.mlp.outputs)
        assert {p for p in STRUCTURES[family][7] if any(p in name for name in outputs)} == (
            STRUCTURES[family][7]
        )
    # The output projections are all there is to zero: without them nothing is added.
    tokens = torch.arange(12)
    parameters = dict(model.named_parameters())
    units = find_units(model, "joint")
    expected = output_without(model, tokens, frozenset(units.parts), units.parts)
    with torch.no_grad():
        for found in sublayers:
            for name in (*found.attention.outputs, *found.mlp.outputs):
                parameters[name].zero_()
        assert torch.equal(model.base_model(tokens[None], use_cache=False)[0][0], expected)


def test_bf16_adds_up_within_its_roundings(make: Callable[..., Any]) -> None:
    model = make("gpt_neox").bfloat16()
    assert [found.topology for found in find_sublayers(model)] == ["parallel"] * 6


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("lfm2_moe", {}, "no single attention that is known"),
        ("bloom", {}, "input [+] attention [+] MLP is not the block's output"),
        ("minimax", {}, "input [+] attention [+] MLP is not the block's output"),
        ("granite", {"residual_multiplier": 0.5}, "input [+] attention [+] MLP is not the block"),
        ("opt", {"do_layer_norm_before": False}, "input [+] attention [+] MLP is not the block's"),
        ("mpt", {}, "no single MLP that is known"),
        ("bert", {"is_decoder": True}, "no single MLP that is known"),
    ],
)
def test_unknown_structures_are_refused(
    family: str, options: dict[str, Any], reason: str, make: Callable[..., Any]
) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        find_sublayers(make(family, **options))
    assert "\n" not in str(caught.value)
