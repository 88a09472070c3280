"""Compressed caches against whole ones whose other tokens are hidden."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from compress.tokens.cache import cache_report, compressing
from compress.tokens.cache_policy import CachePolicy

POLICY = CachePolicy(0.5, window=4, sinks=2)
# The first layer of which stays whole.
BY_HEAD = CachePolicy(0.5, 4, 2, shares=(3, 2, 1, 1, 0.5), head_groups=((0,), (1,), (), (0,), (0,)))
GROUPED = replace(BY_HEAD, shares=(2, 2, 1, 1, 0.5))
PROMPT = [[40], [25]]
QUIET = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [90, 91, 92, 93]}


def forward(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def fill(model: Any, inputs: dict[str, Any], policy: CachePolicy) -> Any:
    cache = DynamicCache()
    with compressing(model, policy):
        forward(model, **inputs, past_key_values=cache)
    return cache


def positions(whole: Any, part: Any, attended: torch.Tensor) -> list[list[list[int]]]:
    """By row and head, where in the ``whole`` layer the tokens of its ``part`` stood."""
    found, held = [], getattr(part, "valid", attended.bool()[:, None])
    for row in range(len(part.keys)):
        heads = []
        for head in range(part.keys.shape[1]):
            valid = held[row, min(head, held.shape[1] - 1)]
            kept = part.keys[row, head, : len(valid)][valid]
            same = (kept[:, None] == whole.keys[row, head]).all(-1)
            assert (same.sum(1) == 1).all()
            values = part.values[row, head, : len(valid)][valid]
            assert torch.equal(values, whole.values[row, head][same.int().argmax(1)])
            heads.append(same.int().argmax(1).tolist())
        found.append(heads)
    return found


def with_others_hidden(tiny: Any, cache: Any, kept: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits of later ``inputs`` that see, of a whole ``cache``, what layers and heads kept."""
    layers, (rows, length) = tiny.model.get_decoder().layers, inputs["input_ids"].shape
    config = tiny.model.get_decoder().config
    past = cache.layers[0].keys.shape[2]
    masks = []
    for by_row in kept:
        mask = torch.zeros(rows, len(by_row[0]), length, past + length, dtype=torch.bool)
        for row, by_head in enumerate(by_row):
            for head, places in enumerate(by_head):
                mask[row, head, :, places] = True
        mask[..., past:] = torch.ones(length, length, dtype=torch.bool).tril()
        mask = mask.repeat_interleave(config.num_attention_heads // mask.shape[1], 1)
        if config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        masks.append(mask)

    def show(mask: torch.Tensor) -> Any:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    pairs = zip(layers, masks, strict=True)
    handles = [
        layer.register_forward_pre_hook(show(mask), with_kwargs=True) for layer, mask in pairs
    ]
    found = forward(tiny.model, **inputs, past_key_values=cache)
    for handle in handles:
        handle.remove()
    return found


def longer(mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([mask, torch.ones_like(tokens)], 1)


@pytest.mark.parametrize("policy", [POLICY, BY_HEAD], ids=["alike", "by head"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen2", "sdpa"),
        ("qwen3", "eager"),
        ("llava", "sdpa"),
        ("qwen2_5_vl", "eager"),
    ],
)
def test_later_tokens_see_what_was_kept(
    family: str, attention: str, side: str, policy: CachePolicy, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny(family, attention)
    visual = [[9, "image", 15], [4, "image", 9]]
    inputs = tiny.inputs(PROMPT if family in ("llama", "qwen2", "qwen3") else visual, side)
    whole = DynamicCache()
    logits = forward(tiny.model, **inputs, past_key_values=whole)
    tokens = torch.randint(10, 60, (2, 3), generator=torch.Generator().manual_seed(5))
    part = DynamicCache()
    with compressing(tiny.model, policy):
        assert torch.equal(forward(tiny.model, **inputs, past_key_values=part), logits)
        pairs = zip(whole.layers, part.layers, strict=True)
        kept = [positions(*pair, inputs["attention_mask"]) for pair in pairs]
        totals = inputs["attention_mask"].sum(1).tolist()
        for by_row in kept:
            for by_head, real in zip(by_row, inputs["attention_mask"].bool(), strict=True):
                first, last = real.nonzero()[[0, -1], 0].tolist()
                ends = {first, first + 1, *range(last - 3, last + 1)}
                assert all(ends <= set(places) and real[places].all() for places in by_head)
        for row, total in enumerate(totals):
            held = sum(len(places) for by_row in kept for places in by_row[row])
            most = total // 2 * 10
            assert most - 5 <= held <= most + 10
        after = {"input_ids": tokens, "attention_mask": longer(inputs["attention_mask"], tokens)}
        if family == "qwen2_5_vl":  # it would work them out for the whole sequence
            after["position_ids"] = torch.arange(50, 53).expand(3, 2, 3)
        together = forward(tiny.model, **after, past_key_values=copy.deepcopy(part))
        steps, past = [], inputs["input_ids"].shape[1]
        for i in range(3):
            one = {name: value[..., i : i + 1] for name, value in after.items()}
            one["attention_mask"] = after["attention_mask"][:, : past + i + 1]
            steps.append(forward(tiny.model, **one, past_key_values=part))
        assert part.get_seq_length() == past + 3
    expected = with_others_hidden(tiny, whole, kept, after)
    close(together, expected)
    close(torch.cat(steps, 1), expected)


def test_snapkv_keeps_what_the_last_tokens_attend_to(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama", "eager")
    inputs = tiny.inputs([[60]])
    whole = DynamicCache()
    with torch.no_grad():
        weights = tiny.model(**inputs, past_key_values=whole, output_attentions=True).attentions
    part = fill(tiny.model, inputs, POLICY)
    for layer, attention in enumerate(weights):
        received = attention[0, :, -4:].mean(1).view(2, 2, 60).mean(1)
        received[:, :2] = received[:, -4:] = 0
        pooled = torch.nn.functional.pad(received, (2, 2)).unfold(1, 5, 1).mean(-1)
        expected = [
            sorted([0, 1, *(row[2:-4].topk(24).indices + 2).tolist(), *range(56, 60)])
            for row in pooled
        ]
        assert (
            positions(whole.layers[layer], part.layers[layer], inputs["attention_mask"])[0]
            == expected
        )


def test_other_scorers_keep_what_they_say(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    inputs, whole = tiny.inputs([[60]]), DynamicCache()
    forward(tiny.model, **inputs, past_key_values=whole)

    def kept(scorer: Any, layer: int = 3, seed: int = 0) -> list[list[int]]:
        part = fill(tiny.model, inputs, CachePolicy(0.5, 4, 2, scorer, seed=seed))
        return positions(whole.layers[layer], part.layers[layer], inputs["attention_mask"])[0]

    assert kept("recent") == [[0, 1, *range(32, 60)]] * 2
    norms = whole.layers[3].keys[0, :, 2:-4].norm(dim=-1)
    shortest = [sorted((row.topk(24, largest=False).indices + 2).tolist()) for row in norms]
    assert [places[2:-4] for places in kept("knorm")] == shortest
    one, other = kept("random")
    assert one != other
    assert [one, other] == kept("random")
    assert [one, other] not in (kept("random", layer=2), kept("random", seed=1))


@pytest.mark.parametrize("scorer", ["snapkv", "knorm", "random", "recent"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_keeps_the_same_in_a_batch_as_alone(
    scorer: Any, side: str, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny("llama")
    policy = CachePolicy(0.5, 4, 2, scorer, shares=(2, 1, 1, 1, 0.7), head_groups=((1,),) * 5)
    rows = [[40], [25], [5]]  # the last of which stays whole
    inputs = tiny.inputs(rows, side)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch = fill(tiny.model, inputs, policy)
    for row, prompt in enumerate(rows):
        alone = fill(tiny.model, tiny.inputs([prompt], first=row), policy)
        for one, other in zip(batch.layers, alone.layers, strict=True):
            for head in (0, 1):
                own = one.keys[row, head, : one.valid.shape[-1]][one.valid[row, head]]
                keys = other.keys[0, head]
                if getattr(other, "valid", None) is not None:
                    keys = keys[other.valid[0, head]]
                close(own, keys)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_generating_with_beams(family: str, make_tiny: Callable[..., Any]) -> None:
    """Beams hold copies of a cache that are reordered at each step."""
    tiny = make_tiny(family)
    inputs = tiny.inputs(PROMPT if family == "llama" else [[9, "image", 15], [4, "image", 9]])
    options = {**QUIET, "max_new_tokens": 6, "return_dict_in_generate": True}
    with compressing(tiny.model, GROUPED):
        greedy = tiny.model.generate(**inputs, **options)
        beams = tiny.model.generate(**inputs, **options, num_beams=3)
    assert beams.sequences.shape == greedy.sequences.shape
    cache = greedy.past_key_values
    grown = inputs["input_ids"].shape[1] + 5
    assert cache.get_seq_length() == grown
    assert all(layer.slots < grown for layer in cache.layers[2:])


def test_rows_of_a_cache_may_be_reordered_repeated_and_dropped(
    make_tiny: Callable[..., Any],
) -> None:
    tiny = make_tiny("llama")
    inputs, order = tiny.inputs(PROMPT), torch.tensor([1, 0])
    tokens = torch.tensor([[11], [12]])
    mask = longer(inputs["attention_mask"], tokens)
    caches = [fill(tiny.model, inputs, GROUPED) for _ in range(4)]
    with compressing(tiny.model, GROUPED):

        def after(cache: Any, rows: torch.Tensor) -> torch.Tensor:
            later = {"input_ids": tokens[rows], "attention_mask": mask[rows]}
            return forward(tiny.model, **later, past_key_values=cache)

        expected = after(caches[0], torch.arange(2))
        caches[1].reorder_cache(order)
        close(after(caches[1], order), expected[order])
        caches[2].batch_repeat_interleave(2)
        twice = torch.tensor([0, 0, 1, 1])
        close(after(caches[2], twice), expected[twice])
        caches[3].batch_select_indices(order[:1])
        close(after(caches[3], order[:1]), expected[order[:1]])


@pytest.mark.parametrize("policy", [POLICY, GROUPED], ids=["alike", "by head"])
def test_a_prompt_in_pieces_is_a_prompt(policy: CachePolicy, make_tiny: Callable[..., Any]) -> None:
    """Where the first piece is left whole: then the same is kept as of all at once."""
    tiny = make_tiny("llama")
    inputs = tiny.inputs([[60], [40]])
    whole = fill(tiny.model, inputs, policy)
    cache = DynamicCache()
    first = {name: value[:, :40] for name, value in inputs.items()}
    forward(tiny.model, **first, past_key_values=cache)
    rest = {**inputs, "input_ids": inputs["input_ids"][:, 40:]}
    with compressing(tiny.model, policy):
        forward(tiny.model, **rest, past_key_values=cache)
    for one, other in zip(whole.layers, cache.layers, strict=True):
        assert torch.equal(one.valid, other.valid)
        close(one.keys, other.keys)


@pytest.mark.parametrize("policy", [POLICY, GROUPED], ids=["alike", "by head"])
def test_later_turns_stay_within_the_budget(
    policy: CachePolicy, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny("llama")
    cache, mask = DynamicCache(), torch.zeros(2, 0, dtype=torch.long)
    with compressing(tiny.model, policy) as engine:
        for turn, side in enumerate(("left", "right", "left")):
            inputs = tiny.inputs([[40], [30]], side, first=2 * turn)
            mask = torch.cat([mask, inputs["attention_mask"]], 1)
            forward(
                tiny.model,
                input_ids=inputs["input_ids"],
                attention_mask=mask,
                past_key_values=cache,
            )
            token = torch.tensor([[11], [12]])
            mask = longer(mask, token)
            again = copy.deepcopy(cache)
            step = {"input_ids": token, "attention_mask": mask}
            assert forward(tiny.model, **step, past_key_values=cache).isfinite().all()
            assert engine.report is not None
            assert engine.report.tokens == tuple((mask.sum(1) - 1).tolist())
            held = sum(layer.valid.expand(-1, 2, -1)[0].sum() for layer in again.layers)
            assert abs(int(held) - engine.report.tokens[0] * 5) <= 10
        assert cache.get_seq_length() == mask.shape[1]


def test_a_whole_budget_changes_no_bit(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("qwen3")
    inputs = tiny.inputs(PROMPT)
    options = {**QUIET, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    whole = tiny.model.generate(**inputs, **options)
    with compressing(tiny.model, CachePolicy(1.0, 4, 2)):
        same = tiny.model.generate(**inputs, **options)
    assert torch.equal(whole.sequences, same.sequences)
    assert all(map(torch.equal, whole.logits, same.logits))
    assert {type(layer).__name__ for layer in same.past_key_values.layers} == {"DynamicLayer"}


def test_short_prompts_and_forwards_without_a_cache_stay_whole(
    make_tiny: Callable[..., Any],
) -> None:
    tiny = make_tiny("llama")
    inputs = tiny.inputs([[6], [4]])
    whole = DynamicCache()
    forward(tiny.model, **inputs, past_key_values=whole)
    same = fill(tiny.model, inputs, POLICY)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(whole.layers, same.layers, strict=True))
    long = tiny.inputs(PROMPT)
    with compressing(tiny.model, POLICY):
        expected = forward(tiny.model, **long, use_cache=False)
        assert cache_report(tiny.model) is None
    assert torch.equal(forward(tiny.model, **long, use_cache=False), expected)


@pytest.mark.parametrize("policy", [POLICY, GROUPED], ids=["alike", "by head"])
def test_the_report_tells_what_the_tensors_take(
    policy: CachePolicy, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny("llama")
    inputs, cache = tiny.inputs([[100]]), DynamicCache()
    with compressing(tiny.model, policy) as engine:
        forward(tiny.model, **inputs, past_key_values=cache)
    report = engine.report
    assert report is not None
    token = 2 * 8 * 4  # keys and values of a head
    assert report.before == (100 * 2 * token,) * 5
    assert report.tokens == (100,)
    assert report.share == pytest.approx(0.5, abs=0.006)
    held = [layer.valid.expand(-1, 2, -1).sum().item() for layer in cache.layers]
    assert report.after == tuple(count * token for count in held)
    assert report.slots == tuple(layer.keys.shape[2] for layer in cache.layers)
