"""Pruned caches: decoding, beams, copies, later turns, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from compress.errors import BadInput
from compress.hf import skip_sublayers
from compress.tokens.engine import last_report, pruning, switched_off
from compress.tokens.policy import TokenPolicy
from compress.tokens.segment import Segment

POLICY = TokenPolicy(2, 0.3, "uniform")
PROMPT = TokenPolicy(2, 0.3, "uniform", "text")
ROWS = [[3, "image", 5, "image", 4], [6, "image", 7]]
QUIET = {"do_sample": False, "suppress_tokens": [90, 91, 92, 93], "pad_token_id": 0}


def loudest(segment: Segment, keep: int) -> torch.Tensor:
    return segment.hidden.float().norm(dim=1).topk(keep).indices.sort().values


def last_logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def decode(
    model: Any, inputs: dict[str, Any], cache: Any, tokens: torch.Tensor
) -> list[torch.Tensor]:
    """Logits after each of ``tokens`` [rows, n], fed one at a time."""
    mask, found = inputs["attention_mask"], []
    for token in tokens.T[:, :, None]:
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        found.append(
            last_logits(model, input_ids=token, attention_mask=mask, past_key_values=cache)
        )
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_decoding_from_the_cache_is_computing_anew(
    family: str, attention: str, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny(family, attention)
    inputs = tiny.inputs(ROWS)
    tokens = torch.randint(10, 60, (2, 3), generator=torch.Generator().manual_seed(5))
    with pruning(tiny.model, POLICY, selector=loudest):
        cache = DynamicCache(config=tiny.model.config)
        last_logits(tiny.model, **inputs, past_key_values=cache)
        lengths = [layer.keys.shape[2] for layer in cache.layers[:5]]
        assert lengths == list(last_report(tiny.model).lengths)
        twin = copy.deepcopy(cache)
        found = decode(tiny.model, inputs, cache, tokens)
        again = decode(tiny.model, inputs, twin, tokens)
        for step, (one, other) in enumerate(zip(found, again, strict=True), 1):
            assert torch.equal(one, other)
            added = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            longer = dict(inputs)
            for name in inputs.keys() & {"input_ids", "attention_mask", "token_type_ids"}:
                new = added.get(name, torch.zeros_like(tokens))
                longer[name] = torch.cat([inputs[name], new[:, :step]], 1)
            close(one, last_logits(tiny.model, **longer, use_cache=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_beams_and_samples(family: str, make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny(family)
    inputs = tiny.inputs(ROWS)
    with pruning(tiny.model, POLICY, selector=loudest):
        beams = [
            tiny.model.generate(**inputs, **QUIET, max_new_tokens=5, num_beams=3, use_cache=cached)
            for cached in (True, False)
        ]
        assert beams[0].tolist() == beams[1].tolist()
        drawn = []
        for cached in (True, False):
            torch.manual_seed(3)
            options = {**QUIET, "do_sample": True, "use_cache": cached, "num_return_sequences": 2}
            drawn.append(tiny.model.generate(**inputs, **options, max_new_tokens=5).tolist())
        assert drawn[0] == drawn[1]


def test_rows_of_a_cache_may_be_reordered_repeated_and_dropped(
    make_tiny: Callable[..., Any],
) -> None:
    """The rows hold different tokens, and one of them is filled up."""
    tiny = make_tiny("llava")
    inputs = tiny.inputs(ROWS)
    tokens = torch.tensor([[11, 12], [13, 14]])
    order = torch.tensor([1, 0])
    with pruning(tiny.model, POLICY, selector=loudest):
        cache = DynamicCache()
        last_logits(tiny.model, **inputs, past_key_values=cache)
        caches = [copy.deepcopy(cache) for _ in range(3)]
        expected = torch.stack(decode(tiny.model, inputs, cache, tokens), 1)
        mask = inputs["attention_mask"]

        caches[0].reorder_cache(order)
        found = decode(tiny.model, {"attention_mask": mask[order]}, caches[0], tokens[order])
        close(torch.stack(found, 1), expected[order])
        caches[1].batch_repeat_interleave(2)
        twice = [each.repeat_interleave(2, 0) for each in (mask, tokens, expected)]
        found = decode(tiny.model, {"attention_mask": twice[0]}, caches[1], twice[1])
        close(torch.stack(found, 1), twice[2])
        caches[2].batch_select_indices(order[:1])
        found = decode(tiny.model, {"attention_mask": mask[1:]}, caches[2], tokens[1:])
        close(torch.stack(found, 1), expected[1:])


def test_what_was_decoded_may_be_cropped_and_the_prompt_may_not(
    make_tiny: Callable[..., Any],
) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs(ROWS)
    tokens = torch.tensor([[11, 12, 17], [13, 14, 18]])
    with pruning(tiny.model, POLICY, selector=loudest):
        cache = DynamicCache()
        last_logits(tiny.model, **inputs, past_key_values=cache)
        expected = decode(tiny.model, inputs, cache, tokens)
        cache.crop(-3)
        for one, other in zip(decode(tiny.model, inputs, cache, tokens), expected, strict=True):
            assert torch.equal(one, other)
        cache.crop(-4)
        with pytest.raises(BadInput, match="cropped into a pruned prompt"):
            decode(tiny.model, inputs, cache, tokens)
        cache.reset()
        last_logits(tiny.model, **inputs, past_key_values=cache)
        assert torch.equal(decode(tiny.model, inputs, cache, tokens)[-1], expected[-1])
    cache.reset()
    last_logits(tiny.model, **inputs, past_key_values=cache)  # whole, in the same cache
    with pruning(tiny.model, POLICY, selector=loudest):
        found = decode(tiny.model, inputs, cache, tokens)
    whole = DynamicCache()
    last_logits(tiny.model, **inputs, past_key_values=whole)
    assert torch.equal(decode(tiny.model, inputs, whole, tokens)[-1], found[-1])


def test_a_pruned_cache_used_without_its_pruning_is_noticed(
    make_tiny: Callable[..., Any],
) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs([[3, "image", 5]])
    token, cache = torch.tensor([[11]]), DynamicCache()
    with pruning(tiny.model, POLICY, selector=loudest):
        last_logits(tiny.model, **inputs, past_key_values=cache)
        with switched_off(tiny.model):  # which keeps what was pruned right
            decode(tiny.model, inputs, cache, token)
    last_logits(tiny.model, input_ids=token, past_key_values=cache)
    with (
        pruning(tiny.model, POLICY, selector=loudest),
        pytest.raises(BadInput, match="used without its pruning"),
    ):
        last_logits(tiny.model, input_ids=token, past_key_values=cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_a_second_turn_brings_another_image(
    family: str, attention: str, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny(family, attention)
    turns = [[5, "image", 9], [4, "image", 6]]
    first, second = (tiny.inputs([turn], first=i) for i, turn in enumerate(turns))
    whole = {}
    for name in first:
        dim = 1 if name in ("pixel_values",) and family == "smolvlm" else 0
        dim = 1 if first[name].shape[0] == 1 and first[name].ndim == 2 else dim
        dim = 0 if name == "image_grid_thw" else dim
        whole[name] = torch.cat([first[name], second[name]], dim)
    with pruning(tiny.model, POLICY, selector=loudest):
        cache = DynamicCache(config=tiny.model.config)
        last_logits(tiny.model, **first, past_key_values=cache)
        later = dict(second, attention_mask=whole["attention_mask"])
        if family == "gemma3":  # it looks them up by place
            later["token_type_ids"] = whole["token_type_ids"]
        if family.startswith("qwen"):  # as its generate works them out
            later["position_ids"] = tiny.model.model.get_rope_index(
                whole["input_ids"],
                mm_token_type_ids=whole["mm_token_type_ids"],
                image_grid_thw=whole["image_grid_thw"],
                attention_mask=whole["attention_mask"],
            )[0][..., first["input_ids"].shape[1] :]
        found = last_logits(tiny.model, **later, past_key_values=cache)
        report = last_report(tiny.model)
        expected = last_logits(tiny.model, **whole)
        complete = last_report(tiny.model)
    close(found, expected)
    assert report.segments[0].positions.tolist() == complete.segments[1].positions.tolist()
    assert [layer.keys.shape[2] for layer in cache.layers[:5]] == list(complete.lengths)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_whole_turn_before_a_pruned_one_and_after_it(
    side: str, make_tiny: Callable[..., Any]
) -> None:
    """The first turn was cached without pruning; the third is text alone, longer than a token."""
    tiny = make_tiny("llava")
    inputs = tiny.inputs([[20, "image", 6], [30, "image", 9]], side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.randint(10, 60, (2, 4), generator=torch.Generator().manual_seed(2))
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    cache = DynamicCache()
    cut = 15
    last_logits(
        tiny.model, input_ids=ids[:, :cut], attention_mask=mask[:, :cut], past_key_values=cache
    )
    with pruning(tiny.model, POLICY, selector=loudest):
        turn = dict(inputs, input_ids=ids[:, cut:])
        last_logits(tiny.model, **turn, past_key_values=cache)
        found = last_logits(
            tiny.model, input_ids=more, attention_mask=longer, past_key_values=cache
        )
        together = dict(inputs, input_ids=torch.cat([ids, more], 1), attention_mask=longer)
        if side == "left":  # where later tokens follow the padding, positions differ
            close(found, last_logits(tiny.model, **together))
        else:
            places = torch.arange(together["input_ids"].shape[1])[None].expand(2, -1)
            close(found, last_logits(tiny.model, **together, position_ids=places))


def test_prompts_in_chunks(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs([[9, "image", 14]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with pruning(tiny.model, POLICY, selector=loudest):
        expected = last_logits(tiny.model, **inputs)
        cache = DynamicCache()
        for start, stop in ((0, 6), (6, 30), (30, 41)):  # the image lies in the second
            pixels = {"pixel_values": inputs["pixel_values"]} if start == 6 else {}
            chunk = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], **pixels}
            found = last_logits(tiny.model, **chunk, past_key_values=cache)
        close(found, expected)
        cache = DynamicCache()
        last_logits(tiny.model, input_ids=ids[:, :15], past_key_values=cache)
        with pytest.raises(BadInput, match="split over two forwards"):
            last_logits(tiny.model, input_ids=ids[:, 15:], past_key_values=cache)


def test_text_in_chunks_is_pruned_chunk_by_chunk(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    inputs = tiny.inputs([[130]])
    with pruning(tiny.model, PROMPT, selector=loudest):
        whole = tiny.model.generate(**inputs, **QUIET, max_new_tokens=3)
        assert last_report(tiny.model).segments[0].tokens == 130 - 4 - 32
        options = {**QUIET, "max_new_tokens": 3, "prefill_chunk_size": 70}
        parts = tiny.model.generate(**inputs, **options, return_dict_in_generate=True)
        assert whole.shape == parts.sequences.shape
        # 70 - 4 - 32 = 34, of which 11 stay; then 60 - 32 = 28, of which 9 stay; two were decoded.
        held = 130 - (34 - 11) - (28 - 9) + 2
        cache = parts.past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers[:5]] == [132, 132, held, held, held]


def test_other_caches_are_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs([[3, "image", 5]])
    with pruning(tiny.model, POLICY, selector=loudest):
        with pytest.raises(BadInput, match="StaticCache.*expected a DynamicCache"):
            tiny.model.generate(**inputs, **QUIET, max_new_tokens=2, cache_implementation="static")
        static = StaticCache(config=tiny.model.config, max_cache_len=64)
        with pytest.raises(BadInput, match="StaticCache"):
            last_logits(tiny.model, **inputs, past_key_values=static)
        with pytest.raises(BadInput, match="assisted decoding"):
            tiny.model.generate(**inputs, **QUIET, max_new_tokens=4, prompt_lookup_num_tokens=2)


def test_a_sequence_longer_than_its_window_is_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("gemma3_text", sliding_window=64)
    with pruning(tiny.model, PROMPT, selector=loudest):
        found = tiny.model.generate(**tiny.inputs([[62]]), **QUIET, max_new_tokens=3)
        assert found.shape[1] == 65  # the last of which was not fed
        with pytest.raises(BadInput, match="sliding window.*got 65 tokens, expected at most 64"):
            tiny.model.generate(**tiny.inputs([[62]]), **QUIET, max_new_tokens=4)
        last_logits(tiny.model, **tiny.inputs([[36]]))  # nothing to prune in it


def test_skipped_sublayers_leave_their_caches_whole(make_tiny: Callable[..., Any]) -> None:
    """A cache that lost a layer must not be taken for one that has yet to lose it."""
    tiny = make_tiny("llama")
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        for parameter in model.model.layers[3].self_attn.parameters():
            parameter.zero_()
    model.config.entropress_skip = {"3": {"skip": ["attention"]}}
    inputs = tiny.inputs([[60], [81]])
    found = []
    for _ in range(2):
        for cache in (None, DynamicCache(), DynamicCache(config=model.config)):
            with pruning(model, PROMPT, selector=loudest):
                options = {**QUIET, "max_new_tokens": 4, "past_key_values": cache}
                found.append(model.generate(**inputs, **options).tolist())
        skip_sublayers(model)
    assert all(tokens == found[0] for tokens in found)
    with (
        pytest.raises(BadInput, match="removed"),
        pruning(model, TokenPolicy(4, 1, "uniform", "text")),
    ):
        pass
