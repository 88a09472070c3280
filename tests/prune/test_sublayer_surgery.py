"""Sublayers zeroed in the files, against sublayers that add nothing in the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress import checkpoint as room
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.prune import Removal, check_pruned, find_units, output_without, remove_blocks
from compress.prune.sublayer_surgery import drop_sublayers, skip_config

ATTENTION, MLP = (0, 3), (1, 3, 5)
NOTHING: Removal = frozenset()
# Of each family one tensor's name that must be zero, and one that must not be touched.
FAMILIES: dict[str, tuple[str, str]] = {
    "llama": ("layers.0.self_attn.k_proj.weight", "layers.0.mlp.up_proj.weight"),
    "mistral": ("layers.1.mlp.up_proj.weight", "layers.1.self_attn.k_proj.weight"),
    "qwen2": ("layers.0.self_attn.q_proj.bias", "layers.2.self_attn.q_proj.bias"),
    "qwen3": ("layers.3.self_attn.q_norm.weight", "layers.3.input_layernorm.weight"),
    "gemma2": ("layers.0.self_attn.o_proj.weight", "layers.0.post_attention_layernorm.weight"),
    "gemma3_text": ("layers.5.mlp.gate_proj.weight", "layers.5.pre_feedforward_layernorm.weight"),
    "phi3": ("layers.3.self_attn.qkv_proj.weight", "layers.4.self_attn.qkv_proj.weight"),
    "phi": ("layers.0.self_attn.dense.bias", "layers.0.input_layernorm.weight"),
    "olmo2": ("layers.1.mlp.down_proj.weight", "layers.1.post_feedforward_layernorm.weight"),
    "gpt2": ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"),
    "gpt_neox": ("layers.3.attention.dense.weight", "layers.3.post_attention_layernorm.weight"),
    "opt": ("layers.1.fc1.weight", "layers.1.final_layer_norm.weight"),
    "falcon": ("h.1.mlp.dense_h_to_4h.weight", "h.1.input_layernorm.weight"),
    "cohere": ("layers.0.self_attn.v_proj.weight", "layers.0.input_layernorm.weight"),
    "mixtral": (
        "layers.1.block_sparse_moe.experts.0.w1.weight",
        "layers.2.block_sparse_moe.experts.0.w1.weight",
    ),
    "qwen3_moe": ("layers.3.mlp.gate.weight", "layers.2.mlp.gate.weight"),
    "qwen2_moe": ("layers.1.mlp.shared_expert_gate.weight", "layers.2.mlp.gate_proj.weight"),
    "gpt_oss": ("layers.0.self_attn.sinks", "layers.0.mlp.router.weight"),
    "llama4_text": ("layers.1.feed_forward.router.weight", "layers.1.self_attn.k_proj.weight"),
    "deepseek_v3": ("layers.5.mlp.gate.weight", "layers.4.mlp.gate.weight"),
    "afmoe": ("layers.3.mlp.experts.0.up_proj.weight", "layers.3.post_mlp_layernorm.weight"),
    "smollm3": ("layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": 8},
}
FAST = ("llama", "gemma3_text", "gpt_neox", "opt", "mixtral")
CASES = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


def bytes_of(checkpoint: Checkpoint, name: str) -> bytes:
    return b"".join(map(bytes, checkpoint.chunks(name)))


def without(model: Any, tokens: Any, attention: Iterable[int], mlp: Iterable[int]) -> Any:
    """The last hidden state, nothing added by the attention and the MLP of those blocks."""
    removal = frozenset([*(("attention", i) for i in attention), *(("mlp", i) for i in mlp)])
    return output_without(model, tokens, removal, find_units(model, "joint").parts)


def skipped(config: Any) -> dict[int, list[str]]:
    """What transformers itself reads from a config."""
    return {i: layer.skip for i, layer in enumerate(config.per_layer_config) if layer.skip}


@pytest.mark.parametrize("family", CASES)
def test_stock_transformers_computes_the_model_without_them(
    family: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family(family, tmp_path / "new", **OPTIONS.get(family, {}))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases are zero when new
            parameter.data += torch.randn(parameter.shape) / 10
    model.save_pretrained(tmp_path / "model")
    original = room.open(tmp_path / "model")
    tokens = torch.arange(40) * 7 % 97
    expected = without(model, tokens, ATTENTION, MLP)
    assert not torch.equal(expected, output_without(model, tokens, NOTHING))

    dropped, zeroed = drop_sublayers(original, ATTENTION, MLP, tmp_path / "dropped")

    assert zeroed
    assert not any(dropped.read(name).any() for name in zeroed)
    check_pruned(dropped, tokens, expected)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dropped", output_loading_info=True
    )
    assert not any(info.values()), info
    assert skipped(loaded.config) == {
        0: ["attention"],
        1: ["mlp"],
        3: ["attention", "mlp"],
        5: ["mlp"],
    }
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (
        loaded.generate(tokens[None, :12], use_cache=cache, **options) for cache in (True, False)
    )
    assert cached.tolist() == uncached.tolist()

    before, after = original.tensor_infos(), dropped.tensor_infos()
    assert [(i.name, i.dtype, i.shape) for i in before.values()] == [
        (i.name, i.dtype, i.shape) for i in after.values()
    ]
    changed = {name for name in before if bytes_of(original, name) != bytes_of(dropped, name)}
    zero, kept = (
        next(name for name in after if name.endswith(f".{ending}")) for ending in FAMILIES[family]
    )
    assert not any(bytes_of(dropped, zero))
    assert kept not in changed
    assert any(bytes_of(original, kept))
    assert not any(any(bytes_of(dropped, name)) for name in changed)
    blocks = {name.split(".self_attn")[0].split(".mlp")[0].split(".")[-1] for name in changed}
    assert not blocks & {"2", "4"}


def test_the_rest_of_config_and_files_stays(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    make_family("llama", tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    original = room.open(tmp_path / "model")
    dropped, _ = drop_sublayers(original, (2,), (), tmp_path / "dropped")
    assert dropped.config == original.config | {"per_layer_config": {"2": {"skip": ["attention"]}}}
    assert (tmp_path / "dropped" / "notes.txt").read_text() == "mine"


def test_dropping_more_and_then_blocks(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("qwen3", tmp_path / "model")
    once, _ = drop_sublayers(room.open(tmp_path / "model"), (3,), (1,), tmp_path / "once")
    twice, _ = drop_sublayers(once, (1,), (), tmp_path / "twice")
    assert twice.config["per_layer_config"] == {
        "1": {"skip": ["attention", "mlp"]},
        "3": {"skip": ["attention"]},
    }
    tokens = torch.arange(20)
    check_pruned(twice, tokens, without(model, tokens, (1, 3), (1,)))
    fewer, _, _ = remove_blocks(twice, (0, 2), tmp_path / "fewer")
    assert skipped(fewer.load_model().config) == {0: ["attention", "mlp"], 1: ["attention"]}


def test_an_interrupted_drop_goes_on(
    make_family: Callable[..., Any],
    tmp_path: Path,
    die_at: Callable[..., bool],
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    make_family("llama", tmp_path / "model").save_pretrained(
        tmp_path / "sharded", max_shard_size="60KB"
    )
    original = room.open(tmp_path / "sharded")
    drop_sublayers(original, (2,), (3,), tmp_path / "whole")
    assert die_at(lambda: drop_sublayers(original, (2,), (3,), tmp_path / "resumed"), 25)
    drop_sublayers(original, (2,), (3,), tmp_path / "resumed")
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_a_config_that_transformers_would_not_take_gets_our_own_key() -> None:
    """It refuses `per_layer_config` where both kinds of windows are set."""
    config = {"model_type": "llama", "num_hidden_layers": 4}
    both = config | {"sliding_window": 8, "attention_chunk_size": 8}
    assert skip_config(both, (1,), ()) == both | {"entropress_skip": {"1": {"skip": ["attention"]}}}
    assert skip_config(config, (1,), ()) == config | {
        "per_layer_config": {"1": {"skip": ["attention"]}}
    }


def test_other_settings_of_a_block_stay_and_text_models_inside_others_are_found() -> None:
    text = {"num_hidden_layers": 4, "per_layer_config": {"1": {"intermediate_size": 5}}}
    config = skip_config({"model_type": "llama", **text}, (), (1, 2))
    assert config["per_layer_config"] == {
        "1": {"intermediate_size": 5, "skip": ["mlp"]},
        "2": {"skip": ["mlp"]},
    }
    nested = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 4}}
    assert skip_config(nested, (), (2,)) == {
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 4, "per_layer_config": {"2": {"skip": ["mlp"]}}},
    }
    json.dumps(config)


@pytest.mark.parametrize(
    ("config", "attention", "reason"),
    [
        ({}, (6,), "no such block to drop the attention of.*got 6.*0 to 5"),
        ({}, range(6), "no block would have attention"),
        ({"per_layer_config": {"0": {"skip": ["attention"]}}}, range(1, 6), "no block would have"),
        ({"quantization_config": {"quant_method": "fp8"}}, (1,), "before quantizing"),
        ({"is_encoder_decoder": True}, (1,), "two stacks"),
        ({"num_kv_shared_layers": 2}, (1,), "keys and values of others"),
        ({"scale_attn_by_inverse_layer_idx": True}, (1,), "scaled by a block's position"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], attention: Any, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        skip_config({"model_type": "llama", "num_hidden_layers": 6, **config}, attention, ())


def test_blocks_of_other_parts_are_refused(make_family: Callable[..., Any], tmp_path: Path) -> None:
    make_family("lfm2_moe", tmp_path / "model")
    with pytest.raises(BadInput, match="no single attention that is known"):
        drop_sublayers(room.open(tmp_path / "model"), (0,), (), tmp_path / "dropped")
    assert not (tmp_path / "dropped").exists()
