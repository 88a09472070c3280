"""Every family against the model without hooks, and against masks in place of pruning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from compress.errors import BadInput
from compress.signals import find_blocks
from compress.tokens.engine import pruning
from compress.tokens.families import TEXT, VISUAL
from compress.tokens.policy import TokenPolicy
from compress.tokens.segment import PrefillReport, Segment

ROWS = [[3, "image", 5, "image", 4], [6, "image", 7]]
PROMPTS: list[list[int | str]] = [[60], [81]]
QUICK = ("llava", "qwen2_5_vl", "llama")  # the others are slow only because they are many


def cases(families: Sequence[str], *attentions: str) -> list[Any]:
    return [
        pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow, id="-".join(case))
        for case in product(families, attentions)
        if case != ("gemma2", "sdpa")  # transformers refuses it
    ]


FAMILIES = (*VISUAL, *TEXT)


def loudest(segment: Segment, keep: int) -> torch.Tensor:
    """By what every layer before K made of the tokens; same in a batch and alone."""
    norms = segment.hidden.float().norm(dim=1) * segment.query.float().norm(dim=(1, 2))
    return norms.topk(keep).indices.sort().values


def evenly(segment: Segment, keep: int) -> torch.Tensor:
    return torch.arange(keep) * len(segment.hidden) // keep


def policy_for(family: str, keep: float, layer: int = 2) -> TokenPolicy:
    return TokenPolicy(layer, keep, "uniform", "visual" if family in VISUAL else "text")


def rows_for(family: str) -> Any:
    return ROWS if family in VISUAL else PROMPTS


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def greedy(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [90, 91, 92, 93]}
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, **settings, pad_token_id=0)[:, length:]


def went_on(inputs: dict[str, Any], report: PrefillReport) -> torch.Tensor:
    """bool [rows, length]: all tokens but padding and those that the report says were pruned."""
    keep = inputs["attention_mask"].bool()
    for segment in report.segments:
        keep[segment.row, segment.start : segment.start + segment.tokens] = False
        keep[segment.row, segment.positions] = True
    return keep


def masked_instead(model: Any, inputs: dict[str, Any], report: PrefillReport) -> torch.Tensor:
    """Logits where all tokens stay, and from layer K on nobody sees those that were pruned."""
    keep = went_on(inputs, report)

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        mask = call.arguments.get("attention_mask")
        length = keep.shape[1]
        own = torch.eye(length, dtype=torch.bool)
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask == 0
        seen = seen & (keep[:, None, None] | own)
        lowest = torch.finfo(torch.float32).min
        call.arguments["attention_mask"] = torch.where(seen, 0.0, lowest)
        return call.args, call.kwargs

    layers = find_blocks(model.get_decoder())[report.layer :]
    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers]
    try:
        return forward(model, inputs)[keep]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("family", "attention"), cases(FAMILIES, "sdpa", "eager"))
def test_keeping_all_through_the_gather_changes_no_bit(
    family: str, attention: str, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny(family, attention)
    for side in ("left", "right"):
        inputs = tiny.inputs(rows_for(family), side)
        whole = forward(tiny.model, inputs)
        with pruning(tiny.model, policy_for(family, 1.0), selector=evenly) as engine:
            gathered = forward(tiny.model, inputs)
        assert engine.report is not None
        assert all(segment.kept == segment.tokens for segment in engine.report.segments)
        assert torch.equal(gathered.view(torch.int32), whole.view(torch.int32))
    with pruning(tiny.model, policy_for(family, 1.0), selector=evenly):
        gathered = greedy(tiny.model, inputs := tiny.inputs(rows_for(family)))
    assert gathered.tolist() == greedy(tiny.model, inputs).tolist()


@pytest.mark.parametrize(("family", "attention"), cases(FAMILIES, "sdpa", "eager"))
def test_pruned_tokens_are_as_if_hidden_from_layer_k_on(
    family: str, attention: str, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny(family, attention)
    for side in ("left", "right"):
        inputs = tiny.inputs(rows_for(family), side)
        with pruning(tiny.model, policy_for(family, 0.3), selector=loudest) as engine:
            pruned = forward(tiny.model, inputs)
        report = engine.report
        assert report is not None
        assert [s.kept for s in report.segments] == [
            -(-s.tokens * 3 // 10) for s in report.segments
        ]
        assert report.lengths[report.layer] < report.lengths[0] == inputs["input_ids"].shape[1]
        keep = went_on(inputs, report)
        assert pruned.shape == (*inputs["input_ids"].shape, 97)
        torch.testing.assert_close(
            pruned[keep], masked_instead(tiny.model, inputs, report), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(("family", "attention"), cases(FAMILIES, "eager"))
def test_a_row_is_pruned_in_a_batch_as_alone(
    family: str, attention: str, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny(family, attention)
    rows = rows_for(family)
    together = tiny.inputs(rows)
    with pruning(tiny.model, policy_for(family, 0.3), selector=loudest) as engine:
        batch = forward(tiny.model, together)
        both = greedy(tiny.model, together)
        found = engine.report.segments
        for number, row in enumerate(rows):
            alone = tiny.inputs([row], first=number)
            length = alone["input_ids"].shape[1]
            assert (
                together["input_ids"][number, -length:].tolist() == alone["input_ids"][0].tolist()
            )
            single = forward(tiny.model, alone)[0]
            torch.testing.assert_close(batch[number, -length:], single, atol=1e-5, rtol=1e-4)
            assert both[number].tolist() == greedy(tiny.model, alone)[0].tolist()
            gone = together["input_ids"].shape[1] - length
            mine = [(s.positions - gone).tolist() for s in found if s.row == number]
            assert mine == [segment.positions.tolist() for segment in engine.report.segments]


@pytest.mark.parametrize(("family", "attention"), cases(VISUAL, "sdpa"))
def test_generation_is_the_same_with_a_cache_and_without(
    family: str, attention: str, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny(family, attention)
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [90, 91, 92, 93]}
    settings |= {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    with pruning(tiny.model, policy_for(family, 0.3), selector=loudest):
        cached, anew = (
            tiny.model.generate(**tiny.inputs(ROWS), **settings, use_cache=use_cache)
            for use_cache in (True, False)
        )
    assert cached.sequences.tolist() == anew.sequences.tolist()
    for one, other in zip(cached.logits, anew.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "attention"),
    cases(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"), "sdpa"),
)
def test_videos_are_segments(family: str, attention: str, make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny(family, attention)
    row = [4, "image", 3, "video", 5]
    inputs = tiny.inputs([row, [9, "video", 2]])
    with pruning(tiny.model, policy_for(family, 0.5), selector=loudest) as engine:
        pruned = forward(tiny.model, inputs)
    report = engine.report
    places = (("image", 1), ("video", 3), ("video", 1))
    sizes = [size for part, place in places for size in tiny.tokens(part, place)]
    assert [segment.tokens for segment in report.segments] == sizes
    keep = went_on(inputs, report)
    expected = masked_instead(tiny.model, inputs, report)
    torch.testing.assert_close(pruned[keep], expected, atol=1e-5, rtol=1e-4)


def test_deepstack_raises_the_layer(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("qwen3_vl")
    for layer, used, notes in ((1, 3, 1), (3, 3, 0), (4, 4, 0)):
        with pruning(tiny.model, policy_for("qwen3_vl", 0.3, layer), selector=loudest) as engine:
            forward(tiny.model, tiny.inputs(ROWS))
        assert engine.report.layer == used
        assert len(engine.report.notes) == notes
    with pytest.raises(BadInput, match="1 to 4"), pruning(tiny.model, policy_for("qwen3_vl", 1, 5)):
        pass


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mixtral", {**HEADS, "num_local_experts": 2}, "unknown family.*mixtral.*mistral, phi3"),
        ("mamba", {}, "one state"),
        ("lfm2", {**HEADS, "layer_types": ["conv", "full_attention"]}, "one state"),
        ("llama", {**HEADS, "num_hidden_layers": 1}, "no such layer.*layer 1"),
    ],
)
def test_other_families_are_refused(family: str, options: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(family, **{**SMALL, **options})
    model = AutoModelForCausalLM.from_config(config)
    with (
        pytest.raises(BadInput, match=reason),
        pruning(model, TokenPolicy(1, 0.5, "uniform", "text")),
    ):
        pass


def test_encoders_and_cross_attention_are_refused() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=50, d_model=16, num_layers=2, d_ff=16, num_heads=2
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    with (
        pytest.raises(BadInput, match="encoder-decoder"),
        pruning(model, TokenPolicy(1, 1, "uniform")),
    ):
        pass
    model.config.is_encoder_decoder, model.config.model_type = False, "mllama"
    with (
        pytest.raises(BadInput, match="cross-attention"),
        pruning(model, TokenPolicy(1, 1, "uniform")),
    ):
        pass


def test_targets_belong_to_their_models(make_tiny: Callable[..., Any]) -> None:
    for family, target in (("llama", "visual"), ("llava", "text")):
        policy = TokenPolicy(2, 0.5, "uniform", target)
        with pytest.raises(BadInput, match="set target"), pruning(make_tiny(family).model, policy):
            pass
