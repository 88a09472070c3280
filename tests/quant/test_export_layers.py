"""Which weights are found to be those of linear layers, and why the others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import checkpoint as room
from compress.errors import BadInput
from compress.quant.export import export_quantized
from compress.quant.layers import Linears, linear_names
from compress.quant.qtensor import Scheme

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
EXPERTS = SIZES | {"num_key_value_heads": 2}
PROJECTIONS = [
    *(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
]


def save(directory: Path, config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Path:
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def found(directory: Path) -> Linears:
    return linear_names(room.open(directory))


def test_a_llama(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    assert found(save(tmp_path, config)) == Linears([*PROJECTIONS, "lm_head.weight"], {})


def test_a_tied_head(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    tied = {"lm_head.weight": "tied to the embeddings"}
    assert found(save(tmp_path, config)) == Linears(PROJECTIONS, tied)


def test_an_encoder_without_head(tmp_path: Path) -> None:
    linears = found(save(tmp_path, transformers.BertConfig(**SIZES), transformers.AutoModel))
    assert linears.skipped == {}
    assert "pooler.dense.weight" in linears.weights
    assert not any("embeddings" in name or "LayerNorm" in name for name in linears.weights)


def test_conv1d_has_its_weight_transposed(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    linears = found(save(tmp_path, transformers.GPT2Config(vocab_size=96, **sizes, **ends)))
    assert linears.weights == []
    assert "Conv1D" in linears.skipped["transformer.h.0.attn.c_attn.weight"]
    assert linears.skipped["lm_head.weight"] == "tied to the embeddings"


def test_routers_and_experts_stay(tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        **EXPERTS,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    )
    directory = save(tmp_path / "model", config)
    linears = found(directory)
    mlp = "model.layers.0.mlp"
    assert f"{mlp}.shared_expert.gate_proj.weight" in linears.weights
    assert linears.skipped == {
        f"{mlp}.gate.weight": "routes tokens to experts",
        f"{mlp}.shared_expert_gate.weight": "routes tokens to experts",
        f"{mlp}.experts.gate_up_proj": "experts are merged into one tensor as they are loaded",
        f"{mlp}.experts.down_proj": "experts are merged into one tensor as they are loaded",
    }
    with pytest.raises(BadInput, match="cannot be loaded once quantized: its experts"):
        export_quantized(
            room.open(directory),
            {linears.weights[0]: Scheme(8, None, True)},
            lambda name: pytest.fail(name),
            tmp_path / "out",
            skipped=linears.skipped,
        )


def test_what_is_stored_otherwise_is_told(tmp_path: Path) -> None:
    directory = save(tmp_path, transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))
    tensors = load_file(directory / "model.safetensors")
    q, k, v, *_ = PROJECTIONS
    tensors[q] = tensors[q].to(torch.float8_e4m3fn)
    tensors["renamed.weight"] = tensors.pop(k)
    tensors[v] = tensors[v][:16].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert found(directory).skipped == {
        q: "stored as F8_E4M3",
        k: "not stored under its own name",
        v: "stored in another shape",
    }


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, transformers.LlamaConfig(**SIZES))
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"llama"', '"nobody"'))
    with pytest.raises(BadInput, match="nobody"):
        found(directory)
