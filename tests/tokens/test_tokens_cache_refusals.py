"""What of caches is not compressed, and that models are left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from compress.errors import BadInput
from compress.hf import skip_sublayers
from compress.tokens.cache import attach_cache, cache_report, compressing, detach_cache
from compress.tokens.cache_policy import CachePolicy
from compress.tokens.engine import attach, attached, pruning
from compress.tokens.policy import TokenPolicy

POLICY = CachePolicy(0.5, window=4, sinks=2)


def refused(model: Any, message: str, **inputs: Any) -> None:
    with compressing(model, POLICY), torch.no_grad(), pytest.raises(BadInput, match=message):
        model(**inputs)


def test_other_caches_are_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    inputs = tiny.inputs([[20]])
    config = tiny.model.config

    class Quantized(DynamicLayer):
        pass

    quantized, mixed = DynamicCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())
    quantized.layers = [Quantized() for _ in range(5)]
    sliding = DynamicCache(config=make_tiny("mistral", sliding_window=8).model.config)
    static = StaticCache(config=config, max_cache_len=32)
    for cache, kind in ((static, "Static"), (quantized, "Quantized"), (sliding, "Sliding")):
        refused(tiny.model, f"this kind.*{kind}", **inputs, past_key_values=cache)
    refused(tiny.model, "this kind.*EncoderDecoderCache", **inputs, past_key_values=mixed)
    with compressing(tiny.model, POLICY), pytest.raises(BadInput, match="this kind"):
        tiny.model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_other_masks_and_attention_are_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    ids = tiny.inputs([[20]])["input_ids"]
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    refused(tiny.model, "padding.*4 dimensions", input_ids=ids, attention_mask=mask)
    flex = make_tiny("llama", "flex_attention")
    refused(flex.model, "this attention.*flex_attention.*'sdpa'", input_ids=ids)


def test_other_models_are_refused(make_tiny: Callable[..., Any]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    translator = T5ForConditionalGeneration(T5Config(vocab_size=32, **small))
    for model, message in (
        (translator, "encoder-decoder"),
        (make_tiny("mistral", sliding_window=8).model, "sliding window.*8 tokens"),
        (make_tiny("gemma3").model, "sliding window"),
    ):
        with pytest.raises(BadInput, match=message), compressing(model, POLICY):
            pass


def test_policies_for_another_model_are_refused(make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llama").model
    for settings, message in (
        ({"shares": (1.0, 1.0)}, "shares: .*2 layers, expected 5"),
        ({"head_groups": ((0,),) * 4}, "head_groups: .*4 layers"),
        ({"head_groups": ((0,), (2,), (), (), ())}, "no such head, got 2, expected.*0 to 1"),
    ):
        with pytest.raises(BadInput, match=message):
            attach_cache(model, CachePolicy(0.5, **settings))
    assert attached(model) is None


def test_guesses_of_an_assistant_are_no_prompt(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    inputs = tiny.inputs([[20]])
    with compressing(tiny.model, POLICY), pytest.raises(BadInput, match="assisted"):
        tiny.model.generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=2)
    tiny.model.generate(**inputs, max_new_tokens=2, prompt_lookup_num_tokens=2)


def test_a_compressed_prompt_cannot_be_cropped(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    inputs, cache = tiny.inputs([[20]]), DynamicCache()
    after = {"input_ids": torch.tensor([[11, 12]]), "past_key_values": cache}
    with compressing(tiny.model, POLICY), torch.no_grad():
        tiny.model(**inputs, past_key_values=cache)
        expected = tiny.model(**after).logits
        cache.crop(-2)
        assert torch.equal(tiny.model(**after).logits, expected)
        with pytest.raises(BadInput, match="cannot be cropped.*3 tokens.*the 2 that"):
            cache.crop(-3)
        cache.reset()
        cache.crop(0)
        tiny.model(**inputs, past_key_values=cache)
        assert torch.equal(tiny.model(**after).logits, expected)
    cache.reset()
    with torch.no_grad():
        whole = tiny.model(**inputs, past_key_values=cache).logits
        assert torch.equal(whole, tiny.model(**inputs).logits)
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1]))
    assert cache.get_seq_length() == 20


def test_the_model_is_as_before(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    inputs = tiny.inputs([[20]])

    def hooks() -> list[int]:
        modules = list(tiny.model.modules())
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]

    with torch.no_grad():
        expected = tiny.model(**inputs).logits
    before = hooks()
    with pytest.raises(ZeroDivisionError), compressing(tiny.model, POLICY):
        raise ZeroDivisionError
    assert hooks() == before
    attach_cache(tiny.model, POLICY)
    with pytest.raises(BadInput, match="already"):
        attach_cache(tiny.model, POLICY)
    assert cache_report(tiny.model) is None
    detach_cache(tiny.model)
    with pytest.raises(BadInput, match="no cache"):
        detach_cache(tiny.model)
    assert hooks() == before
    with torch.no_grad():
        assert torch.equal(tiny.model(**inputs).logits, expected)
    with (
        pruning(tiny.model, TokenPolicy(2, 0.5, "uniform", "text")),
        pytest.raises(BadInput, match="already"),
        compressing(tiny.model, POLICY),
    ):
        pass


def test_layers_without_attention_have_nothing_to_compress(
    make_tiny: Callable[..., Any],
) -> None:
    tiny = make_tiny("llama")
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for parameter in model.model.layers[2].self_attn.parameters():
            parameter.zero_()
    model.config.entropress_skip = {"2": {"skip": ["attention"]}}
    skip_sublayers(model)
    inputs, found = tiny.inputs([[60], [41]]), []
    policy = CachePolicy(0.5, 4, 2, "recent", shares=(2, 1, 1, 1))
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with compressing(model, policy) as engine:
            options = {"max_new_tokens": 4, "past_key_values": cache, "pad_token_id": 0}
            found.append(model.generate(**inputs, **options, do_sample=False).tolist())
        assert engine.report is not None
        assert engine.report.slots == (48, 24, 24, 24)
    assert found[0] == found[1]
    with pytest.raises(BadInput, match="5 layers, expected 4"):
        attach_cache(model, CachePolicy(0.5, shares=(1.0,) * 5))


def test_a_model_whose_cache_is_compressed_is_not_pruned_as_well(
    make_tiny: Callable[..., Any],
) -> None:
    model = make_tiny("llama").model
    policy = TokenPolicy(layer=1, keep=0.5, selector="uniform", target="text")
    with compressing(model, POLICY), pytest.raises(BadInput, match="its cache is compressed"):
        attach(model, policy)
    assert attached(model) is None
