"""Queries and attention recomputed, against those of the model's own eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from compress.errors import BadInput
from compress.tokens import attention as room
from compress.tokens.engine import pruning
from compress.tokens.policy import TokenPolicy
from compress.tokens.segment import Segment

LAYER = 3
FAMILIES = ("llama", "gemma2", "phi3", "gpt_neox", "gpt2", "qwen3", "qwen2_5_vl", "paligemma")


class Watch:
    """A selector that remembers what it was given of every segment."""

    def __init__(self) -> None:
        self.last: list[torch.Tensor] = []
        self.mutual: list[torch.Tensor] = []
        self.segments: list[Segment] = []

    def __call__(self, segment: Segment, keep: int) -> torch.Tensor:
        self.segments.append(segment)
        self.last.append(segment.last_attention())
        self.mutual.append(segment.mutual_attention())
        return torch.arange(keep)


def watch(model: Any, inputs: dict[str, Any], visual: bool, **options: Any) -> tuple[Watch, Any]:
    seen = Watch()
    policy = TokenPolicy(LAYER, 0.5, "uniform", "visual" if visual else "text", recent=5)
    with torch.no_grad(), pruning(model, policy, selector=seen) as engine:
        model(**inputs, **options)
    return seen, engine.report


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_models(
    family: str, attention: str, make_tiny: Callable[..., Any]
) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers refuses it")
    tiny = make_tiny(family, attention)
    visual = family in ("qwen2_5_vl", "paligemma")
    inputs = tiny.inputs([[3, "image", 5, "image", 4], [6, "image", 7]] if visual else [[20], [31]])
    eager = make_tiny(family, "eager").model
    with torch.no_grad():
        weights = eager(**inputs, output_attentions=True).attentions[LAYER - 1].mean(1)
    seen, report = watch(tiny.model, inputs, visual)
    for i, segment in enumerate(report.segments):
        place = slice(segment.start, segment.start + segment.tokens)
        row = weights[segment.row]
        assert seen.last[i].dtype == torch.float32
        torch.testing.assert_close(seen.last[i], row[-1, place], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(seen.mutual[i], row[place, place].mean(0), atol=1e-6, rtol=1e-4)


def test_the_last_prompt_token_is_no_padding(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava", "eager")
    rows = [[3, "image", 5], [6, "image", 17]]
    left, right = tiny.inputs(rows), tiny.inputs(rows, "right")
    before, _ = watch(tiny.model, left, True)
    after, _ = watch(tiny.model, right, True)
    for one, other in zip(before.last + before.mutual, after.last + after.mutual, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_slices_of_rows_add_up(
    make_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs([[3, "image", 5]])
    whole, _ = watch(tiny.model, inputs, True)
    monkeypatch.setattr(room, "_WEIGHTS_AT_ONCE", 4 * 26 * 3)  # three rows of 16
    sliced, _ = watch(tiny.model, inputs, True)
    torch.testing.assert_close(sliced.mutual[0], whole.mutual[0])


def test_attention_in_a_later_turn_sees_the_earlier_ones(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs([[30, "image", 6]])
    whole, _ = watch(tiny.model, inputs, True)
    cache = DynamicCache()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        tiny.model(input_ids=ids[:, :25], past_key_values=cache)
    turn = {
        "input_ids": ids[:, 25:],
        "attention_mask": mask,
        "pixel_values": inputs["pixel_values"],
    }
    later, _ = watch(tiny.model, turn, True, past_key_values=cache)
    torch.testing.assert_close(later.last[0], whole.last[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(later.mutual[0], whole.mutual[0], atol=1e-6, rtol=1e-4)
    assert later.segments[0].seed == whole.segments[0].seed


class Elsewhere(DynamicLayer):
    """As layers of quantized caches do, it keeps its keys somewhere else."""

    held: Any = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.held is not None:
            keys = torch.cat([self.held[0], keys], 2)
            values = torch.cat([self.held[1], values], 2)
        self.held = keys, values
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.held is None else self.held[0].shape[2]


def test_attention_to_what_a_cache_hides_is_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    inputs = tiny.inputs([[60]])
    cache = Cache(layers=[Elsewhere() for _ in range(5)])
    with torch.no_grad():
        tiny.model(input_ids=inputs["input_ids"][:, :20], past_key_values=cache)
    turn = {**inputs, "input_ids": inputs["input_ids"][:, 20:]}
    with pytest.raises(BadInput, match="hides its keys"):
        watch(tiny.model, turn, False, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "gpt2"])
def test_queries_are_those_before_rotation(family: str, make_tiny: Callable[..., Any]) -> None:
    """Of the second prompt they are the first one's, whatever comes before in the batch."""
    tiny = make_tiny(family)
    model, inputs = tiny.model, tiny.inputs([[20], [31]])
    seen, report = watch(model, inputs, False)
    block = model.get_decoder()
    layer = (block.h if family == "gpt2" else block.layers)[LAYER - 1]
    module = next(
        getattr(layer, n) for n in ("self_attn", "attn", "attention") if hasattr(layer, n)
    )
    given: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        for segment, part in zip(seen.segments, report.segments, strict=True):
            x = given[0][part.row, part.start : part.start + part.tokens]
            if family in ("llama", "qwen3"):
                q = module.q_proj(x).view(-1, 4, 8)
                q = module.q_norm(q) if family == "qwen3" else q
            elif family == "gpt_neox":
                q = module.query_key_value(x).view(-1, 4, 24)[..., :8]
            else:
                q = (module.qkv_proj if family == "phi3" else module.c_attn)(x)[:, :32].view(
                    -1, 4, 8
                )
            torch.testing.assert_close(segment.query, q, atol=1e-6, rtol=1e-5)
