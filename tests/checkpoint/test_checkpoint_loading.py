"""Models load with all their weights or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

from compress import checkpoint
from compress.errors import BadInput, Corrupt

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **TINY)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_tied_causal_model(llama):
    model = checkpoint.open(llama).load_model()
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not model.training
    tied = model.lm_head.weight.view(torch.int16)
    assert torch.equal(
        tied, checkpoint.open(llama).read("model.embed_tokens.weight").view(torch.int16)
    )
    assert checkpoint.open(llama).load_model(dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_the_class_named_in_the_config(tmp_path, kind):
    kind(BertConfig(num_hidden_layers=1, **TINY)).save_pretrained(tmp_path)
    assert type(checkpoint.open(tmp_path).load_model()) is kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "1 missing keys"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "1 unexpected keys"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(3)}), "mismatched keys"),
    ],
)
def test_weights_that_do_not_fit(llama, change, message):
    path = llama / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(Corrupt, match=message):
        checkpoint.open(llama).load_model()


def test_an_unknown_architecture_and_no_tokenizer(llama):
    with pytest.raises(BadInput, match="no tokenizer"):
        checkpoint.open(llama).tokenizer()
    for config in ('{"architectures": ["pipeline"], "model_type": "nonesuch"}', "{}"):
        (llama / "config.json").write_text(config)
        with pytest.raises(BadInput, match="transformers cannot load it"):
            checkpoint.open(llama).load_model()


def test_a_config_that_transformers_refuses_is_told_in_one_line(llama):
    path = llama / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": ', '"hidden_size": "wide", "was": '))
    with pytest.raises(BadInput, match="transformers cannot load it.*hidden_size") as error:
        checkpoint.open(llama).load_model()
    assert "\n" not in str(error.value)
