"""Tiny random models of many families, saved by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BLOCKS = 6
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"sliding_window": 8, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
    "qwen3": {"head_dim": 8},
    "gemma2": SLIDING,
    "gemma3_text": {**SLIDING, "sliding_window_pattern": 3},
    "gpt2": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**MOE, "head_dim": 8, "mlp_only_layers": [0, 4]},
    "qwen2_moe": {**MOE, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 24},
    "smollm3": {},
    "llama4_text": {
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
        "head_dim": 8,
    },
    "lfm2_moe": {
        **MOE,
        "num_dense_layers": 3,
        "layer_types": ["conv", "full_attention"] * (BLOCKS // 2),
    },
    "afmoe": {**MOE, **SLIDING, "num_dense_layers": 3},
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 3,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


@pytest.fixture(scope="session")
def make_family() -> Callable[..., Any]:
    """A random float32 model of a family, with options of one's own, saved into a directory."""

    def make(family: str, directory: Path, **options: Any) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        common = {} if family == "gpt2" else COMMON
        settings = {"vocab_size": 97, **common, **FAMILIES.get(family, {}), **options}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
        for parameter in model.parameters():  # as initialised, blocks change next to nothing
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(directory)
        return model

    return make
