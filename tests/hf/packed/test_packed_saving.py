"""`save_pretrained` of a packed model writes the coded checkpoint that it was loaded from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from compress import checkpoint, codec
from compress.errors import Corrupt
from compress.hf.packed import Packed
from compress.hf.quantizer import EntropressConfig
from compress.pipeline import decompress

BF16, F16 = torch.bfloat16, torch.float16
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
}
LLAMA = transformers.LlamaConfig(**SIZES)
MODELS = {
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": transformers.LlamaConfig(**SIZES, attention_bias=True),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=3),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32
    ),
}


def packed(directory: Path, form: str = "auto", auto: Any = AutoModelForCausalLM, **options: Any):
    config = EntropressConfig(packed=form)
    return auto.from_pretrained(directory, quantization_config=config, **options)


def raw(directory: Path) -> dict[str, torch.Tensor]:
    """What the shards hold, as it is."""
    return {
        name: tensor
        for shard in directory.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(shard).items()
    }


def assert_same_files(got: Path, expected: Path) -> None:
    """The same coded bytes under the same names; config.json the same but for what is of a save."""
    tensors, others = raw(got), raw(expected)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    stated, other = (
        json.loads((directory / "config.json").read_text())["quantization_config"]
        for directory in (got, expected)
    )
    # `encode` of the tests leaves it out, `encode_weights` does not.
    assert stated.pop("dtype") in ("bfloat16", "float16")
    assert stated == other


def save(kit: Any, config: Any, directory: Path, dtype: torch.dtype = BF16) -> tuple[Path, Path]:
    """A model's dense and its coded directory."""
    kit.random_model(config, dtype).save_pretrained(directory / "dense")
    return directory / "dense", kit.encode(directory / "dense", directory / "coded")


@pytest.mark.parametrize("form", ["stored", "fast", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_checkpoint_again(name, form, kit, tmp_path):
    dense_dir, coded = save(kit, MODELS[name], tmp_path)
    model = packed(coded, form)
    expected = kit.logits(model)
    for again in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(again)
        assert_same_files(again, coded)
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    loaded = AutoModelForCausalLM.from_pretrained(again)
    kit.assert_same(loaded.state_dict(), dense.state_dict())
    assert torch.equal(kit.integers(kit.logits(packed(again))), kit.integers(expected))
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(expected))


def test_in_shards_of_a_size(kit, tmp_path):
    _, coded = save(kit, LLAMA, tmp_path, F16)
    packed(coded).save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
    assert_same_files(tmp_path / "again", coded)
    assert checkpoint.open(tmp_path / "again").coded
    kit.assert_same(kit.stored(tmp_path / "again"), kit.stored(coded))


def test_what_was_trained_is_saved(kit, tmp_path):
    _, coded = save(kit, LLAMA, tmp_path)
    before = kit.stored(coded)
    model = packed(coded).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    tokens = torch.arange(12).reshape(2, 6)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "again")
    after = kit.stored(tmp_path / "again")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("norm" in name for name in changed)
    assert torch.equal(
        kit.integers(kit.logits(packed(tmp_path / "again"))), kit.integers(kit.logits(model.eval()))
    )


def test_under_other_names_the_bytes_say_so(kit, tmp_path):
    """Coded bytes begin with a checksum of the name; the base model's names lack a part."""
    dense_dir, coded = save(kit, LLAMA, tmp_path)
    base = AutoModel.from_pretrained(dense_dir)
    packed(coded, auto=AutoModel).save_pretrained(tmp_path / "base")
    loaded = AutoModel.from_pretrained(tmp_path / "base")
    kit.assert_same(loaded.state_dict(), base.state_dict())

    model, info = packed(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    model.save_pretrained(tmp_path / "causal")
    causal = kit.stored(tmp_path / "causal")
    del causal["lm_head.weight"]
    expected = kit.stored(coded)
    del expected["lm_head.weight"]
    kit.assert_same(causal, expected)


def test_stored_bytes_are_not_coded_again(kit, tmp_path, monkeypatch):
    _, coded = save(kit, LLAMA, tmp_path)
    model = packed(coded)
    shapes = []
    encode = codec.encode

    def counted(name: str, dtype: str, shape: Any, chunks: Any, *args: Any) -> Any:
        shapes.append(len(shape) if chunks else 0)
        return encode(name, dtype, shape, chunks, *args)

    monkeypatch.setattr(codec, "encode", counted)
    model.save_pretrained(tmp_path / "again")
    assert shapes.count(1) == 5  # the norms
    assert set(shapes) == {0, 1}


def test_one_layer_at_a_time_is_dense(kit, tmp_path, monkeypatch):
    """Experts are cut apart again, of one layer after the other."""
    _, coded = save(kit, MODELS["mixtral"], tmp_path)
    model = packed(coded)
    decoded = []
    dense = Packed.dense

    def counted(self: Packed, *args: Any) -> torch.Tensor:
        decoded.append(self)
        return dense(self, *args)

    monkeypatch.setattr(Packed, "dense", counted)
    model.save_pretrained(tmp_path / "again")
    held = [layer.mlp.experts for layer in model.model.layers]
    assert decoded == [held[0], held[0], held[1], held[1]]


def test_the_config_is_of_the_checkpoint_alone(kit, tmp_path):
    _, coded = save(kit, LLAMA, tmp_path)
    packed(coded, "fast").save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    members = set(config["quantization_config"])
    assert members == {
        "quant_method",
        "format_version",
        "min_reader",
        "tensors",
        "names_sha256",
        "dtype",
    }
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "again").is_quantized


def test_of_adapters_only_they_are_saved(kit, tmp_path):
    peft = pytest.importorskip("peft")
    _, coded = save(kit, LLAMA, tmp_path)
    model = packed(coded)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/config.json").exists()
    held = safetensors.torch.load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(held) == 8
    assert all("lora_" in name for name in held)


def test_it_can_be_decompressed_without_a_manifest(kit, tmp_path):
    dense, coded = save(kit, LLAMA, tmp_path)
    packed(coded).save_pretrained(tmp_path / "saved")
    plain = raw(decompress(tmp_path / "saved", tmp_path / "plain"))
    expected = raw(dense)
    assert plain.keys() == expected.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
    shard = tmp_path / "saved" / "model.safetensors"
    tensors = safetensors.torch.load_file(shard)
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(Corrupt):
        decompress(tmp_path / "saved", tmp_path / "other")
