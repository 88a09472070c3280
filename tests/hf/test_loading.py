"""Plain `from_pretrained` of a coded checkpoint gives the dense model, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from compress import codec
from compress.errors import BadInput

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48}
MODELS = {
    "llama": (transformers.LlamaConfig(**LLAMA), BF16),
    "llama-tied": (transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True), BF16),
    "llama-biases-fp32": (
        transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
        F32,
    ),
    "gpt2-fp16": (
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64),
        F16,
    ),
    "bert-fp32": (transformers.BertConfig(**SIZES, intermediate_size=48), F32),
    "mixtral": (transformers.MixtralConfig(**LLAMA, num_local_experts=3), BF16),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig(
            **LLAMA, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
        ),
        BF16,
    ),
    # Buffers in the checkpoint: running statistics and an int64 counter.
    "resnet-fp32": (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        F32,
    ),
}
BASE = {"bert-fp32", "resnet-fp32"}


def outputs(model, kit):
    if isinstance(model, transformers.ResNetModel):
        with torch.no_grad():
            return model(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).pooler_output
    return kit.logits(model)


@pytest.mark.parametrize("max_shard_size", ["1GB", "5KB"])
@pytest.mark.parametrize("name", MODELS)
def test_loads_and_saves_like_the_dense_checkpoint(name, max_shard_size, kit, tmp_path):
    config, dtype = MODELS[name]
    auto = AutoModel if name in BASE else AutoModelForCausalLM
    model = kit.random_model(config, dtype, base=name in BASE)
    model.save_pretrained(tmp_path / "dense", max_shard_size=max_shard_size)
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    shards = len(list(coded.glob("*.safetensors")))
    assert shards == 1 if max_shard_size == "1GB" else shards > 1

    loaded, info = auto.from_pretrained(coded, output_loading_info=True)

    assert not any(info.values()), info
    dense = auto.from_pretrained(tmp_path / "dense")
    kit.assert_same(loaded.state_dict(), dense.state_dict())
    assert torch.equal(kit.integers(outputs(loaded, kit)), kit.integers(outputs(dense, kit)))
    assert loaded.dtype == dtype

    loaded.save_pretrained(tmp_path / "again")
    kit.assert_same(kit.stored(tmp_path / "again"), kit.stored(tmp_path / "dense"))
    kit.assert_same(auto.from_pretrained(tmp_path / "again").state_dict(), dense.state_dict())
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


def test_the_loaded_model_is_an_ordinary_one(llama, kit):
    dense, coded = llama
    model = AutoModelForCausalLM.from_pretrained(coded)
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert repr(model) == repr(AutoModelForCausalLM.from_pretrained(dense))

    model = model.to(F32).train()
    before = model.lm_head.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(12).reshape(2, 6)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)
    assert model.half().dtype == F16


def test_every_bit_pattern_survives(kit, tmp_path):
    model = kit.random_model(kit.llama, BF16)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
    model.model.layers[0].mlp.gate_proj.weight.data.copy_(patterns[: 48 * 32].reshape(48, 32))
    model.model.layers[0].mlp.up_proj.weight.data.copy_(patterns[-48 * 32 :].reshape(48, 32))
    model.model.embed_tokens.weight.data.copy_(patterns[32640 : 32640 + 96 * 32].reshape(96, 32))
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "dense")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    kit.assert_same(AutoModelForCausalLM.from_pretrained(coded).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert-fp32"])
@pytest.mark.parametrize("dtype", [F32, F16, "auto", "bfloat16"])
def test_dtype_override_casts_as_for_dense(name, dtype, kit, tmp_path):
    config, stored_dtype = MODELS[name]
    auto = AutoModel if name in BASE else AutoModelForCausalLM
    model = kit.random_model(config, stored_dtype, base=name in BASE)
    model.save_pretrained(tmp_path / "dense")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    kit.assert_same(
        auto.from_pretrained(coded, dtype=dtype).state_dict(),
        auto.from_pretrained(tmp_path / "dense", dtype=dtype).state_dict(),
    )


def forget_dtype(dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    config.pop("dtype")
    (dense / "config.json").write_text(json.dumps(config))


def test_dtype_auto_without_a_dtype_in_the_config(kit, tmp_path):
    kit.random_model(kit.llama, BF16).save_pretrained(tmp_path / "dense")
    forget_dtype(tmp_path / "dense")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded", dtype="bfloat16")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    kit.assert_same(AutoModelForCausalLM.from_pretrained(coded).state_dict(), dense.state_dict())


def test_without_any_dtype_the_user_is_asked(kit, tmp_path):
    kit.random_model(kit.llama, BF16).save_pretrained(tmp_path / "dense")
    forget_dtype(tmp_path / "dense")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    with pytest.raises(BadInput, match="dtype"):
        AutoModelForCausalLM.from_pretrained(coded)
    assert AutoModelForCausalLM.from_pretrained(coded, dtype=BF16).dtype == BF16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, llama, kit):
    dense, coded = llama
    kit.assert_same(
        AutoModelForCausalLM.from_pretrained(coded, device_map=device_map).state_dict(),
        AutoModelForCausalLM.from_pretrained(dense).state_dict(),
    )


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_disk_offload(name, kit, tmp_path):
    config, dtype = MODELS[name]
    model = kit.random_model(config, dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    loaded = AutoModelForCausalLM.from_pretrained(
        coded, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(kit.integers(kit.logits(loaded)), kit.integers(kit.logits(model)))
    loaded.save_pretrained(tmp_path / "again")
    kit.assert_same(kit.stored(tmp_path / "again"), kit.stored(tmp_path / "dense"))


def test_keys_are_renamed_as_for_dense(kit, tmp_path):
    """A base model from a causal one, a causal one from a base one, and a user's own mapping."""
    model = kit.random_model(kit.llama, BF16)
    model.save_pretrained(tmp_path / "dense")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    kit.assert_same(AutoModel.from_pretrained(coded).state_dict(), model.model.state_dict())

    model.model.save_pretrained(tmp_path / "base")
    coded_base = kit.encode(tmp_path / "base", tmp_path / "coded_base")
    loaded, info = AutoModelForCausalLM.from_pretrained(coded_base, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    kit.assert_same(loaded.model.state_dict(), model.model.state_dict())

    model.save_pretrained(
        tmp_path / "renamed",
        state_dict={f"old.{name}": tensor for name, tensor in model.state_dict().items()},
    )
    coded_renamed = kit.encode(tmp_path / "renamed", tmp_path / "coded_renamed")
    renamed = AutoModelForCausalLM.from_pretrained(coded_renamed, key_mapping={"^old.": ""})
    kit.assert_same(renamed.state_dict(), model.state_dict())


def test_legacy_names_of_layer_norms(kit, tmp_path):
    """Old BERTs say gamma and beta; transformers renames them while it loads."""
    model = kit.random_model(MODELS["bert-fp32"][0], F32, base=True)
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    assert legacy.keys() != model.state_dict().keys()
    model.config.save_pretrained(tmp_path / "dense")
    safetensors.torch.save_file(legacy, tmp_path / "dense/model.safetensors", {"format": "pt"})
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded", dtype="float32")
    kit.assert_same(AutoModel.from_pretrained(coded).state_dict(), model.state_dict())


def test_disable_mmap(llama, kit):
    dense, coded = llama
    kit.assert_same(
        AutoModelForCausalLM.from_pretrained(coded, disable_mmap=True).state_dict(),
        AutoModelForCausalLM.from_pretrained(dense).state_dict(),
    )


def test_dense_checkpoints_load_after_a_coded_one(llama, kit):
    dense, coded = llama
    expected = kit.stored(dense)
    AutoModelForCausalLM.from_pretrained(coded)
    kit.assert_same(AutoModelForCausalLM.from_pretrained(dense).state_dict(), expected)

    config = transformers.AutoConfig.from_pretrained(coded)
    given = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=dict(expected)
    )
    kit.assert_same(given.state_dict(), expected)


def test_the_numpy_fallback_loads_too(llama, kit, monkeypatch):
    dense, coded = llama
    monkeypatch.setenv("ENTROPRESS_BACKEND", "fallback")
    assert "fallback" in codec.backend()
    kit.assert_same(
        AutoModelForCausalLM.from_pretrained(coded).state_dict(),
        AutoModelForCausalLM.from_pretrained(dense).state_dict(),
    )
