"""config.json after the cut, field by field, and the fields that stop it."""

from __future__ import annotations

from typing import Any

import pytest

from compress.errors import BadInput
from compress.prune import block_count, cut_config, stale_patterns

KEEP = [0, 2, 3, 5]


def config(kind: str = "llama", **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, "num_hidden_layers": 6, **fields}


def test_the_count_under_any_name() -> None:
    assert cut_config(config(), KEEP) == config(num_hidden_layers=4)
    gpt2 = {"model_type": "gpt2", "n_layer": 6}
    assert block_count(gpt2) == 6
    assert cut_config(gpt2, KEEP) == {"model_type": "gpt2", "n_layer": 4}
    assert block_count({"model_type": "gpt2"}) == 12  # not stated, so the default counts
    assert cut_config({"model_type": "gpt2"}, KEEP)["num_hidden_layers"] == 4


def test_layer_types_are_written_out_where_they_were_derived() -> None:
    cut = cut_config(config("gemma3_text", sliding_window_pattern=3), KEEP)
    sliding, full = "sliding_attention", "full_attention"
    assert cut["layer_types"] == [sliding, full, sliding, full]
    assert stale_patterns(cut) == ["layer_types"]
    assert stale_patterns(cut_config(config("qwen2"), KEEP)) == []


def test_stated_layer_types_are_cut() -> None:
    types = ["full_attention"] * 3 + ["sliding_attention"] * 3
    cut = cut_config(config("qwen2", layer_types=types, max_window_layers=3), KEEP)
    assert cut["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert cut["max_window_layers"] == 2


def test_positions_without_rope() -> None:
    cut = cut_config(config("smollm3"), KEEP)
    assert cut["no_rope_layers"] == [1, 1, 0, 1]


def test_lists_of_indices_are_renumbered() -> None:
    assert cut_config(config("qwen3_moe", mlp_only_layers=[0, 1, 5]), KEEP)["mlp_only_layers"] == [
        0,
        3,
    ]
    moe = cut_config(config("llama4_text", interleave_moe_layer_step=2), KEEP)
    assert moe["moe_layers"] == [2, 3]


def test_a_sparse_step_becomes_a_list() -> None:
    cut = cut_config(config("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[3]), KEEP)
    assert (cut["decoder_sparse_step"], cut["mlp_only_layers"]) == (1, [0, 1, 2])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v3", "first_k_dense_replace"),
        ("lfm2_moe", "num_dense_layers"),
        ("afmoe", "num_dense_layers"),
    ],
)
def test_leading_dense_blocks_are_counted(kind: str, name: str) -> None:
    types = {} if kind != "lfm2_moe" else {"layer_types": ["conv", "full_attention"] * 3}
    assert cut_config(config(kind, **types, **{name: 3}), KEEP)[name] == 2


def test_settings_by_block_move_with_it() -> None:
    by_block = {"1": {"skip": ["mlp"]}, "5": {"intermediate_size": 8}}
    cut = cut_config(config(per_layer_config=by_block), KEEP)
    assert cut["per_layer_config"] == {"3": {"intermediate_size": 8}}


def test_a_nested_text_config_is_the_one_that_counts() -> None:
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 6}
    text = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    assert block_count(whole) == 6
    cut = cut_config(whole, KEEP)
    assert cut["vision_config"] == vision
    assert cut["text_config"]["num_hidden_layers"] == 4
    assert len(cut["text_config"]["layer_types"]) == 4


def test_our_own_coding_is_left_behind() -> None:
    coded = config(quantization_config={"quant_method": "entropress"})
    assert cut_config(coded, KEEP) == config(num_hidden_layers=4)


def test_infinities_are_read_as_transformers_spells_them() -> None:
    limit = [0.0, {"__float__": "Infinity"}]
    fields = {"time_step_limit": limit, "attn_layer_indices": [2, 4], "mamba_n_heads": 128}
    cut = cut_config(config("bamba", **fields), KEEP)
    assert (cut["attn_layer_indices"], cut["time_step_limit"]) == ([1], limit)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (config(my_scales=[1, 2, 3, 4, 5, 6]), "my_scales"),
        (config(my_table={"0": 1, "4": 2}), "my_table"),
        (config("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (config("llama", num_kv_shared_layers=2), "num_kv_shared_layers 2"),
        (config("llama", hidden_size_per_layer_input=8), "hidden_size_per_layer_input 8"),
        (config("jamba", attn_layer_period=5), "attn_layer_period 5"),
        (config("ernie4_5_moe"), "moe_layer_start_index 1"),
        (config("ernie4_5_moe", moe_layer_start_index=0), "moe_layer_end_index 5"),
        (config("mllama_text_model", cross_attention_layers=[1, 4]), "cross_attention_layers"),
        (config("recurrent_gemma"), "block_types"),
        ({"model_type": "t5"}, "is_encoder_decoder"),
        ({"model_type": "gpt_neo", "num_layers": 6, "attention_types": [[["global"], 6]]}, "att"),
    ],
)
def test_what_is_not_known_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput, match=f"blocks cannot be removed: .*{named}"):
        cut_config(fields, KEEP)


PALIGEMMA = {"model_type": "paligemma", "text_config": config("gemma")}
THINKER = {"model_type": "qwen2_5_omni_thinker", "text_config": config("qwen2_5_omni_text")}


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "colpali", "vlm_config": PALIGEMMA},
        {"model_type": "colqwen2", "vlm_config": {"model_type": "qwen2_vl"}},
        {"model_type": "qwen2_5_omni", "thinker_config": THINKER},
        {"model_type": "longcat_flash", "num_layers": 6},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_a_count_that_would_not_follow_is_refused(fields: dict[str, Any]) -> None:
    keep = range(block_count(fields) - 1)
    with pytest.raises(BadInput, match=f"{fields['model_type']}: .*number in an unknown place"):
        cut_config(fields, keep)


def test_lists_that_only_happen_to_be_as_long_are_no_reason() -> None:
    tokens = [1, 2, 3, 4, 5, 6]
    labels = {str(i): f"LABEL_{i}" for i in range(6)}
    cut = cut_config(config(eos_token_id=tokens, id2label=labels), KEEP)
    assert (cut["eos_token_id"], cut["id2label"]) == (tokens, labels)


@pytest.mark.parametrize("kind", ["no_such_model", None])
def test_an_unknown_model_type(kind: str | None) -> None:
    with pytest.raises(BadInput, match=f"cannot read the config of model type {kind}"):
        block_count({"model_type": kind, "num_hidden_layers": 6})


def test_a_config_that_contradicts_itself() -> None:
    with pytest.raises(BadInput, match=r"config\.json: transformers cannot read .*layer_types"):
        block_count(config("qwen2", layer_types=["full_attention"] * 5))
