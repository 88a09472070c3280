from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import BadInput
from compress.quant.qat.attention import Attention, watching

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
GLU = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GLU,
    "qwen3": {**GLU, "head_dim": 8},
    "gemma2": {**GLU, "head_dim": 8, "sliding_window": 8},
    "gpt_neox": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def make(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


def unchanged(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return keys, values


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_shows_what_it_computes(family: str) -> None:
    model, row = make(family), torch.arange(20)[None]
    seen: list[Attention] = []
    before = model.config._attn_implementation
    with torch.no_grad():
        plain = model(row).logits
        with watching(model, seen.append, unchanged):
            watched = model(row).logits
        assert len(seen) == 2
        torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
        for attention in seen:
            assert attention.queries.shape == (1, 4, 20, 8)
            torch.testing.assert_close(attention.maps.sum(-1), torch.ones(1, 4, 20))
            assert attention.maps.triu(1).eq(0).all()
        assert model.config._attn_implementation == before
        assert model(row).logits.equal(plain)
    assert len(seen) == 2


def test_keys_and_values_can_be_changed() -> None:
    model, row = make("llama"), torch.arange(20)[None]
    seen: list[Attention] = []
    with torch.no_grad(), watching(model, seen.append, lambda k, v: (0 * k, v)):
        model(row)
    even = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
    torch.testing.assert_close(seen[0].maps, even.expand(1, 4, 20, 20))


def test_another_model_is_not_watched() -> None:
    model, other = make("llama"), make("llama")
    other.set_attn_implementation("eager")
    seen: list[Attention] = []
    with torch.no_grad(), watching(model, seen.append, unchanged):
        other(torch.arange(20)[None])
    assert seen == []


def test_attention_comes_back_after_an_error() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = make("llama")
    before = model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt), watching(model, lambda seen: None, unchanged):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == before
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


def test_a_model_that_does_not_let_attention_be_exchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with (
        pytest.raises(BadInput, match="LlamaForCausalLM: its attention cannot be watched; set qat"),
        watching(model, lambda seen: None, unchanged),
    ):
        pass
