"""`from_pretrained` with packed weights gives a model that computes what the dense one does."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, modeling_utils

from compress import checkpoint
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.hf.packed import Packed
from compress.hf.quantizer import EntropressConfig
from compress.prune import drop_sublayers

BF16, F16 = torch.bfloat16, torch.float16
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 192}
TIED = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
MODELS = {
    "llama": transformers.LlamaConfig(**LLAMA, attention_bias=True),
    "llama-tied": TIED,
    "mixtral": transformers.MixtralConfig(**LLAMA, num_local_experts=3),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32
    ),
    "gemma3": transformers.Gemma3TextConfig(**LLAMA, head_dim=32),
    "gpt2": transformers.GPT2Config(
        n_embd=128, n_layer=2, n_head=4, vocab_size=512, n_positions=64, bos_token_id=0
    ),
    "bert": transformers.BertConfig(**SIZES, intermediate_size=192),
}
CASES = [(name, "auto", BF16) for name in MODELS] + [
    ("llama", "auto", F16),
    ("bert", "auto", F16),
    ("qwen3-moe", "auto", F16),
    ("llama-tied", "fast", BF16),
    ("mixtral", "dense", BF16),
    ("gemma3", "dense", BF16),
]


def auto_class(name: str) -> Any:
    return AutoModel if name == "bert" else AutoModelForCausalLM


def packed(directory: Path, form: Any = "auto", auto: Any = AutoModelForCausalLM, **options: Any):
    config = EntropressConfig(packed=form)
    return auto.from_pretrained(directory, quantization_config=config, **options)


def packed_modules(model: Any) -> dict[str, Packed]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def raw(directory: Path) -> dict[str, torch.Tensor]:
    """What the shards hold, as it is."""
    return {
        name: tensor
        for shard in directory.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(shard).items()
    }


def save(model: Any, directory: Path, kit: Any, **options: Any) -> tuple[Path, Path]:
    """A model's dense and its coded directory."""
    model.save_pretrained(directory / "dense", **options)
    return directory / "dense", kit.encode(directory / "dense", directory / "coded")


@pytest.fixture(scope="module")
def saved(kit: Any, tmp_path_factory: Any) -> Any:
    """The directories of a model by name and dtype, in several shards."""
    made: dict[Any, tuple[Path, Path]] = {}

    def get(name: str, dtype: torch.dtype = BF16) -> tuple[Path, Path]:
        if (name, dtype) not in made:
            model = kit.random_model(MODELS[name], dtype, base=name == "bert")
            directory = tmp_path_factory.mktemp("packed")
            made[name, dtype] = save(model, directory, kit, max_shard_size="300KB")
        return made[name, dtype]

    return get


@pytest.mark.parametrize(("name", "form", "dtype"), CASES)
def test_it_computes_what_the_dense_model_does(name, form, dtype, saved, kit):
    dense_dir, coded = saved(name, dtype)
    dense = auto_class(name).from_pretrained(dense_dir)
    model, info = packed(coded, form, auto_class(name), output_loading_info=True)

    assert not any(info.values()), info
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(dense)))
    held = packed_modules(model)
    forms = {weight.form for module in held.values() for weight in module.packings.values()}
    assert forms == {"stored" if form == "auto" else form}
    large = [weight for weight in model.parameters() if weight.numel() > 128 * 128]
    assert not large
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.dtype == dtype
    assert not model.training
    if name != "bert":
        tokens = torch.arange(10).reshape(2, 5) * 7
        asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(tokens, **asked), dense.generate(tokens, **asked))


def test_it_says_that_it_is_quantized(saved):
    coded = saved("llama")[1]
    model = packed(coded)
    assert model.is_quantized
    assert model.quantization_method == "entropress"
    assert model.config.quantization_config.packed == "auto"
    # What the user asked for is of this load, and not of the checkpoint.
    stated = json.loads((coded / "config.json").read_text())["quantization_config"]
    assert model.config.quantization_config.to_dict() == stated
    assert not AutoModelForCausalLM.from_pretrained(coded).is_quantized
    assert packed_modules(packed(coded, True))


def test_stored_bytes_are_those_of_the_file(saved):
    coded = saved("llama-tied")[1]
    model = packed(coded, "stored")
    expected = raw(coded)
    for name, module in packed_modules(model).items():
        if name != "lm_head":
            assert torch.equal(module.packed, expected[f"{name}.weight"]), name
    assert len(packed_modules(model)) == 16


def test_the_dense_model_is_never_there(saved, monkeypatch):
    """Of the weights decoded on the way in no two are held at a time."""
    read, alive, most = Checkpoint.read, weakref.WeakSet(), []

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        most.append(len(alive))
        tensor = read(self, name)
        if tensor.dim() > 1:
            alive.add(tensor.untyped_storage())
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    packed(saved("llama")[1])
    assert len(most) > 20
    assert max(most) <= 1


def test_tied_weights_are_one(saved, kit):
    model = packed(saved("llama-tied")[1])
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert model.lm_head.packings["weight"].ints is model.model.embed_tokens.packings["weight"].ints


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_stored_twice(equal, kit, tmp_path):
    model = kit.random_model(transformers.LlamaConfig(**LLAMA), BF16)
    if equal:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.config.tie_word_embeddings = True
    dense_dir, coded = save(model, tmp_path, kit)
    assert "lm_head.weight" in kit.stored(coded)
    dense, loaded = AutoModelForCausalLM.from_pretrained(dense_dir), packed(coded)
    tied = loaded.lm_head.packed is loaded.model.embed_tokens.packed
    assert tied == (dense.lm_head.weight is dense.model.embed_tokens.weight) == equal
    assert torch.equal(kit.integers(kit.logits(loaded)), kit.integers(kit.logits(dense)))


@pytest.mark.parametrize("form", ["stored", "dense"])
def test_a_cast_is_that_of_the_dense_model(form, saved, kit):
    dense_dir, coded = saved("llama")
    dense = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=F16)
    model = packed(coded, form, dtype=F16)
    assert model.dtype == F16
    assert packed_modules(model)
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(dense)))


def test_what_would_not_shrink_stays_dense(kit, tmp_path):
    model = kit.random_model(MODELS["llama"], BF16)
    noise = torch.randint(0, 1 << 14, (192, 128), dtype=torch.int16).view(BF16)
    model.model.layers[0].mlp.up_proj.weight.data.copy_(noise * 0)
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.int16).random_(-(1 << 15), 1 << 15)
    _, coded = save(model, tmp_path, kit)
    loaded = packed(coded, "fast")
    assert "model.layers.1.mlp.gate_proj" in packed_modules(loaded)
    assert "model.layers.1.mlp.up_proj" not in packed_modules(loaded)
    expected = kit.integers(model.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(kit.integers(loaded.model.layers[1].mlp.up_proj.weight), expected)


def test_a_new_head_is_dense_and_can_be_trained(saved):
    auto = transformers.AutoModelForSequenceClassification
    model, info = packed(saved("llama")[1], auto=auto, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert not isinstance(model.score, Packed)
    assert model.score.weight.requires_grad
    assert "model.layers.0.mlp.up_proj" in packed_modules(model)


def test_a_weight_of_another_shape_is_refused_as_ever(saved):
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        packed(saved("llama")[1], vocab_size=500)
    model, info = packed(
        saved("llama")[1], vocab_size=500, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key for key, *_ in info["mismatched_keys"]} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert model.lm_head.weight.shape == (500, 128)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, saved, kit):
    dense_dir, coded = saved("llama")
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    model = packed(coded, device_map=device_map)
    assert packed_modules(model)
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(dense)))


def test_hooks_of_accelerate_call_the_packed_forward(saved, kit, monkeypatch):
    """As where a model is spread over devices: they are put on before the modules are packed."""

    def dispatch(model: Any, *args: Any) -> None:
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)

    monkeypatch.setattr(modeling_utils, "accelerate_dispatch", dispatch)
    dense_dir, coded = saved("llama-tied")
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    # To transformers two devices.
    model = packed(coded, device_map={"model": "cpu", "lm_head": torch.device("cpu")})
    held = packed_modules(model)
    assert len(held) == 16
    assert all(hasattr(module, "_hf_hook") for module in held.values())
    assert all(module._old_forward.__func__ is type(module).forward for module in held.values())
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(dense)))


def test_skipped_sublayers_are_skipped(kit, tmp_path):
    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 4})
    kit.random_model(config, BF16).save_pretrained(tmp_path / "whole")
    drop_sublayers(checkpoint.open(tmp_path / "whole"), (0, 2), (1,), tmp_path / "dense")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    expected = kit.integers(kit.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))
    model = packed(coded)
    assert torch.equal(kit.integers(kit.logits(model)), expected)
    names = packed_modules(model)
    assert "model.layers.0.mlp.up_proj" in names
    assert not any(name.startswith("model.layers.0.self_attn") for name in names)
    model.save_pretrained(tmp_path / "again")
    kit.assert_same(kit.stored(tmp_path / "again"), kit.stored(tmp_path / "dense"))

    whole = EntropressConfig(packed="auto", skip=False)
    model = AutoModelForCausalLM.from_pretrained(coded, quantization_config=whole)
    assert "model.layers.0.self_attn.q_proj" in packed_modules(model)
    assert torch.equal(kit.integers(kit.logits(model)), expected)


def test_base_and_causal_models_take_each_others_weights(saved, kit):
    dense_dir, coded = saved("llama")
    dense = AutoModel.from_pretrained(dense_dir)
    model = packed(coded, auto=AutoModel)
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(dense)))


def test_a_dense_model_is_not_packed_by_a_config(saved):
    with pytest.raises(BadInput, match="entropress compress"):
        packed(saved("llama")[0])


def test_loaded_in_inference_mode(saved, kit):
    dense_dir, coded = saved("llama")
    with torch.inference_mode():
        model = packed(coded)
    assert packed_modules(model)
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(dense)))


def test_a_model_of_which_nothing_shrinks_says_so(kit, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    _, coded = save(kit.random_model(TIED, F16), tmp_path, kit)
    assert not packed_modules(packed(coded, "fast"))
    assert "no weight is smaller packed as 'fast': the model is dense" in caplog.text
    caplog.clear()
    assert packed_modules(packed(coded, "stored"))
    assert "no weight" not in caplog.text


def test_on_a_gpu_kernels_are_ready_when_it_is_loaded(saved, gpu):
    dense, coded = saved("llama", BF16)
    config = EntropressConfig(packed="fast", exact="weights")
    model = AutoModelForCausalLM.from_pretrained(coded, quantization_config=config)
    ready = {name.removeprefix("prepare ") for name in gpu if name.startswith("prepare ")}
    products = {f"linear_fast_bf16_{most}" for most in (1, 2, 4, 8)}
    assert ready == {"unpack_fast", "rows_fast", *products}
    gpu.clear()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        close = model(ids).logits, AutoModelForCausalLM.from_pretrained(dense)(ids).logits
    torch.testing.assert_close(*close, atol=0.02, rtol=0.02)
    assert set(gpu) == {"rows_fast", "linear_fast_bf16_4"}
