"""What stays as it was around a pruned model, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from compress.errors import BadInput
from compress.tokens.engine import (
    attach,
    attached,
    detach,
    last_report,
    pruning,
    switched_off,
)
from compress.tokens.policy import TokenPolicy
from compress.tokens.segment import Segment

LAYER = 2
POLICY = TokenPolicy(LAYER, 0.3, "uniform")
PROMPT = TokenPolicy(LAYER, 0.3, "uniform", "text")
ROWS = [[3, "image", 5, "image", 4], [6, "image", 7]]


def loudest(segment: Segment, keep: int) -> torch.Tensor:
    return segment.hidden.float().norm(dim=1).topk(keep).indices.sort().values


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def hooks(model: Any) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]


class Broken(Exception):
    pass


def break_down(segment: Segment, keep: int) -> torch.Tensor:
    raise Broken


def test_nothing_is_left_behind(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    model, inputs = tiny.model, tiny.inputs(ROWS)
    whole = logits(model, **inputs)
    before = hooks(model), vars(model).keys() - {"training"}, set(vars(model.model.language_model))
    with pruning(model, POLICY, selector=loudest):
        assert not torch.equal(logits(model, **inputs), whole)
        assert hooks(model) != before[0]
    with pruning(model, POLICY, selector=break_down) as engine:
        with pytest.raises(Broken):
            logits(model, **inputs)
        assert not engine._forwards  # which would hold on to states
    with pytest.raises(Broken), pruning(model, POLICY, selector=break_down):
        logits(model, **inputs)
    attach(model, POLICY, selector=loudest)
    detach(model)
    after = hooks(model), vars(model).keys() - {"training"}, set(vars(model.model.language_model))
    assert after == before
    assert torch.equal(logits(model, **inputs), whole)


def test_attaching_twice_and_detaching_nothing(make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llava").model
    assert attached(model) is None
    with pytest.raises(BadInput, match="no tokens of this model are pruned"):
        detach(model)
    with pytest.raises(BadInput), switched_off(model):
        pass
    with pruning(model, POLICY, selector=loudest) as engine:
        assert attached(model) is attached(model.model) is engine
        assert last_report(model) is None
        for part in (model, model.model):
            with pytest.raises(BadInput, match="pruned already"):
                attach(part, POLICY, selector=loudest)
    assert attached(model) is None


def test_a_block_ends_only_its_own_pruning(make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llava").model
    with pruning(model, POLICY, selector=loudest):
        detach(model)
        engine = attach(model, POLICY, selector=loudest)
    assert attached(model) is engine
    detach(model)


def test_padding_is_no_image_whatever_it_is_made_of(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    for side in ("left", "right"):
        inputs = tiny.inputs(ROWS, side)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        found = []
        for padding in (0, 90):
            tokens = ids.masked_fill(mask == 0, padding)
            with pruning(tiny.model, POLICY, selector=loudest):
                states = logits(tiny.model, input_ids=tokens, attention_mask=mask)
                found.append((last_report(tiny.model).lengths, states[mask == 1].tolist()))
        assert found[0] == found[1]


def test_the_policys_own_selector(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs(ROWS)
    with pruning(tiny.model, TokenPolicy(LAYER, 4, "uniform")):
        logits(tiny.model, **inputs)
        assert [segment.kept for segment in last_report(tiny.model).segments] == [4, 4, 4]
    with pytest.raises(BadInput, match="uniform"):
        attach(tiny.model, TokenPolicy(LAYER, 4, "unifrom"))
    assert attached(tiny.model) is None


def test_switched_off_is_whole(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs(ROWS)
    whole = logits(tiny.model, **inputs)
    with pruning(tiny.model, POLICY, selector=loudest):
        with switched_off(tiny.model):
            assert torch.equal(logits(tiny.model, **inputs), whole)
        assert last_report(tiny.model) is None
        assert not torch.equal(logits(tiny.model, **inputs), whole)


def test_a_prompt_without_images_is_whole(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs([[30], [20]])
    whole = logits(tiny.model, **inputs)
    with pruning(tiny.model, POLICY, selector=loudest):
        assert torch.equal(logits(tiny.model, **inputs), whole)


def test_the_same_again_and_no_numbers_drawn(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs(ROWS)
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        policy = TokenPolicy(LAYER, 0.3, "random", seed=seed)
        with pruning(tiny.model, policy):
            found.append(logits(tiny.model, **inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_a_segment_holds(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava", "eager")
    inputs = tiny.inputs(ROWS)
    with torch.no_grad():
        entering = tiny.model(**inputs, output_hidden_states=True).hidden_states[LAYER]
    seen: list[Segment] = []

    def look(segment: Segment, keep: int) -> torch.Tensor:
        seen.append(segment)
        return torch.arange(keep)

    with pruning(tiny.model, POLICY, selector=look):
        logits(tiny.model, **inputs)
        places = last_report(tiny.model).segments
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    assert [(place.row, place.start, place.tokens) for place in places] == [
        (0, 4, 16),
        (0, 27, 16),
        (1, 48 - 31 + 7, 16),
    ]
    for segment, place in zip(seen, places, strict=True):
        row = entering[place.row]
        assert torch.equal(segment.hidden, row[place.start : place.start + 16])
        assert torch.equal(segment.text, row[real[place.row] & (ids[place.row] != 90)])
        assert segment.query.shape == (16, 4, 8)
    assert len({segment.seed for segment in seen}) == 3
    alone = tiny.inputs(ROWS[1:], first=1)
    with pruning(tiny.model, POLICY, selector=look):
        logits(tiny.model, **alone)
    assert seen[-1].seed == seen[2].seed


def test_a_text_prompt_keeps_its_ends(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    policy = TokenPolicy(LAYER, 1, "uniform", "text", sinks=3, recent=7)
    for side, start in (("left", 3 + 20), ("right", 3)):
        with pruning(tiny.model, policy, selector=loudest):
            logits(tiny.model, **tiny.inputs([[60], [40], [9]], side))
            found = last_report(tiny.model)
        assert [(s.row, s.start, s.tokens) for s in found.segments] == [(0, 3, 50), (1, start, 30)]
        # The third row is short, keeps all of its tokens, and its padding.
        assert found.lengths == (60, 60, 60, 60, 60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_bit_changes_in_half_precision(dtype: Any, make_tiny: Callable[..., Any]) -> None:
    for attention in ("sdpa", "eager"):
        tiny = make_tiny("llava", attention)
        model, inputs = copy.deepcopy(tiny.model).to(dtype), tiny.inputs(ROWS)
        whole = logits(model, **inputs)
        with pruning(model, TokenPolicy(LAYER, 1.0, "uniform"), selector=loudest):
            gathered = logits(model, **inputs)
        assert torch.equal(gathered.view(torch.int16), whole.view(torch.int16))
        with pruning(model, TokenPolicy(LAYER, 0.3, "fastv")):
            assert logits(model, **inputs).isfinite().all()


def test_embeddings_need_a_mask(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    ids = tiny.inputs([[5, "image", 9], [8, "image", 6]])["input_ids"]
    states = tiny.model.get_input_embeddings()(ids).detach()
    with pruning(tiny.model, POLICY, selector=loudest) as engine:
        expected = logits(tiny.model, input_ids=ids)
        with pytest.raises(BadInput, match="pass input_ids, or set visual_mask"):
            logits(tiny.model, inputs_embeds=states)
        engine.visual_mask = ids == 90
        assert torch.equal(logits(tiny.model, inputs_embeds=states), expected)
        options = {"max_new_tokens": 3, "suppress_tokens": [90], "pad_token_id": 0, "num_beams": 2}
        beams = tiny.model.generate(inputs_embeds=states, **options)
        engine.visual_mask = None
        assert beams.tolist() == tiny.model.generate(ids, **options)[:, ids.shape[1] :].tolist()


def test_hidden_states_keep_their_length(make_tiny: Callable[..., Any]) -> None:
    """A pruned token leaves with the state that it had before layer K."""
    tiny = make_tiny("llava")
    inputs = tiny.inputs(ROWS)
    model = copy.deepcopy(tiny.model)  # on which nothing was recorded before
    for number in range(2):
        with torch.no_grad(), pruning(model, POLICY, selector=loudest) as engine:
            expected = model(**inputs).logits
            output = model(**inputs, output_hidden_states=True)
            third = model(**inputs, output_hidden_states=3).hidden_states
        states = output.hidden_states
        assert torch.equal(output.logits, expected), number
        assert torch.equal(third[3], states[3])
        gone = inputs["attention_mask"] < 0
        for segment in engine.report.segments:
            gone[segment.row, segment.start : segment.start + segment.tokens] = True
            gone[segment.row, segment.positions] = False
        assert len(states) == 6
        for state in states[LAYER + 1 : -1]:
            assert state.shape == states[0].shape
            assert torch.equal(state[gone], states[LAYER][gone])
            assert not torch.equal(state[~gone], states[LAYER][~gone])
        last = model.model.language_model.norm(states[LAYER][gone])
        assert torch.equal(model.lm_head(last), output.logits[gone])


def test_attention_weights_are_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava", "eager")
    with (
        pruning(tiny.model, POLICY, selector=loudest),
        pytest.raises(BadInput, match="output_attentions"),
    ):
        logits(tiny.model, **tiny.inputs(ROWS), output_attentions=True)


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 90, -100)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("reentrant", [True, False])
def test_losses_gradients_and_their_checkpointing(
    reentrant: bool, make_tiny: Callable[..., Any]
) -> None:
    tiny = make_tiny("llava")
    model, inputs = copy.deepcopy(tiny.model).train(), tiny.inputs(ROWS)
    whole = gradients(model, inputs)
    with pruning(model, TokenPolicy(LAYER, 1.0, "uniform"), selector=loudest):
        kept = gradients(model, inputs)
    with pruning(model, POLICY, selector=loudest):
        pruned = gradients(model, inputs)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again = gradients(model, inputs)
    assert whole.keys() == kept.keys() == pruned.keys() <= again.keys()
    assert not torch.equal(pruned["loss"], whole["loss"])
    for name in whole:
        torch.testing.assert_close(kept[name], whole[name], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(again[name], pruned[name], atol=1e-6, rtol=1e-4)


def test_several_threads_at_once(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llama")
    prompts = [tiny.inputs([[60 + 5 * i]], first=i) for i in range(8)]
    with pruning(tiny.model, PROMPT, selector=loudest):
        one_by_one = [logits(tiny.model, **prompt) for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda prompt: logits(tiny.model, **prompt), prompts))
    assert all(map(torch.equal, found, one_by_one))


def test_a_copy_is_pruned_by_itself(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    inputs = tiny.inputs(ROWS)
    with pruning(tiny.model, POLICY, selector=loudest):
        expected = logits(tiny.model, **inputs)
        twin = copy.deepcopy(tiny.model)
    assert torch.equal(logits(twin, **inputs), expected)
    detach(twin)
    assert torch.equal(logits(twin, **inputs), logits(tiny.model, **inputs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_compiled_models_are_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    model = copy.deepcopy(tiny.model)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(BadInput, match="before torch.compile"), pruning(compiled, POLICY):
        pass
    with (
        pruning(model, POLICY, selector=loudest),
        pytest.raises(BadInput, match="a compiled model is not pruned"),
    ):
        logits(compiled, **tiny.inputs(ROWS))
    torch.compiler.reset()
    model.model.language_model.layers[3].compile(backend="eager")
    with pytest.raises(BadInput, match="before torch.compile"), pruning(model, POLICY):
        pass


def test_block_masks_and_unknown_paddings_are_refused(make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava", "flex_attention")
    inputs = tiny.inputs([[3, "image", 5]])
    with pruning(tiny.model, POLICY, selector=loudest), pytest.raises(BadInput, match="sdpa"):
        logits(tiny.model, **inputs)
    model = make_tiny("llava").model
    inputs["attention_mask"] = torch.ones(1, 1, 26, 26, dtype=torch.bool).tril()
    with pruning(model, POLICY, selector=loudest), pytest.raises(BadInput, match="4 dimensions"):
        logits(model, **inputs)


def test_the_text_stack_by_itself_is_refused(make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llava").model
    with (
        pruning(model, POLICY, selector=loudest),
        pytest.raises(BadInput, match="called by itself"),
        torch.no_grad(),
    ):
        model.model.language_model(torch.tensor([[11, 90, 90, 12]]))


@pytest.mark.parametrize(
    "answer", [torch.arange(4), torch.arange(5).float(), torch.arange(5)[None]], ids=str
)
def test_selectors_that_break_their_word(answer: Any, make_tiny: Callable[..., Any]) -> None:
    tiny = make_tiny("llava")
    with (
        pruning(tiny.model, POLICY, selector=lambda segment, keep: answer),
        pytest.raises(BadInput, match=r"expected torch.int64 \[5\]"),
    ):
        logits(tiny.model, **tiny.inputs(ROWS))
