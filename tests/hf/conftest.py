"""Tiny random models, saved dense and entropress-coded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import compress.hf  # noqa: F401, registers the quantizer
from compress import checkpoint, codec
from compress.checkpoint import NewTensor, names_sha256

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = transformers.LlamaConfig(**SMALL)


def random_model(config: Any, dtype: torch.dtype, seed: int = 0, base: bool = False) -> Any:
    """A model in eval mode; every float tensor is random, so that no two are mixed up unseen."""
    torch.manual_seed(seed)
    auto = transformers.AutoModel if base else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def encode_checkpoint(dense: Path, directory: Path, **extra: Any) -> Path:
    """Code every tensor of a dense checkpoint, as `encode_weights` does."""
    source = checkpoint.open(dense)
    infos = source.tensor_infos()
    coding = {
        "quant_method": "entropress",
        "format_version": codec.FORMAT_VERSION,
        "min_reader": codec.MIN_READER,
        "tensors": len(infos),
        "names_sha256": names_sha256(infos),
    }
    checkpoint.rewrite(
        source,
        directory,
        lambda info: [
            NewTensor(
                info.name,
                "U8",
                None,
                codec.encode(info.name, info.dtype, info.shape, source.chunks(info.name)),
            )
        ],
        config=source.config | {"quantization_config": coding | extra},
        metadata={"format": "pt", "entropress": "1"},
    )
    return directory


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: equal only if every bit is, NaN and -0.0 included."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(integers(got[name]), integers(tensor)), name


def logits(model: Any) -> torch.Tensor:
    """The first output of a fixed batch, shape [2, 7, vocabulary or hidden]."""
    tokens = torch.arange(14).reshape(2, 7) * 5 % 90
    with torch.no_grad():
        return model(tokens)[0]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory under the name it has there."""
    opened = checkpoint.open(directory)
    return {name: opened.read(name) for name in opened.tensor_infos()}


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The functions above, which tests cannot import from here."""
    return SimpleNamespace(
        llama=LLAMA,
        random_model=random_model,
        encode=encode_checkpoint,
        integers=integers,
        assert_same=assert_same_tensors,
        logits=logits,
        stored=stored,
    )


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """A bf16 Llama in three shards: its dense and its coded directory."""
    model = random_model(LLAMA, torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    return tmp_path / "dense", encode_checkpoint(tmp_path / "dense", tmp_path / "coded")
