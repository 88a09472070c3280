"""Losses of pruned models, against models pruned and run in the plainest way."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from compress.errors import BadInput
from compress.prune.fitness import RemovalLoss, Unit
from compress.signals import block_input, find_blocks

BLOCKS = [("block", i) for i in range(6)]
TOKENS = torch.arange(3 * 40).reshape(3, 40) * 7 % 97


@pytest.fixture(scope="module")
def family(
    make_family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = make_family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@contextmanager
def skipping(model: Any, indices: set[int]) -> Iterator[None]:
    def skip(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        state = block_input(args, kwargs)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    blocks = find_blocks(model)
    hooks = [blocks[i].register_forward_hook(skip, with_kwargs=True) for i in indices]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def plain_loss(model: Any, tokens: torch.Tensor, indices: set[int], metric: str) -> float:
    full = model(tokens).logits.double().log_softmax(-1)
    with skipping(model, indices):
        pruned = model(tokens).logits.double().log_softmax(-1)
    if metric == "kl":
        return float((full.exp() * (full - pruned)).sum(-1).mean())
    return math.exp(-float(pruned[:, :-1].gather(-1, tokens[:, 1:, None]).mean()))


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3_text", "qwen3_moe", "llama4_text"]
)
@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_losses_are_those_of_the_models_with_blocks_skipped(
    name: str, metric: str, family: Callable[[str], Any]
) -> None:
    model = family(name)
    sets: list[set[int]] = [{4}, {1, 4}, set(), {0}, {1, 2, 3}, {1, 4, 5}, {0, 5}, {4}]
    found = RemovalLoss(model, TOKENS, metric=metric)([frozenset(units(each)) for each in sets])
    expected = [plain_loss(model, TOKENS, each, metric) for each in sets]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found[0] == found[-1]
    if metric == "kl":
        assert found[2] == 0
    assert len(set(found)) == len(sets) - 1


def units(indices: set[int]) -> list[Unit]:
    return [("block", i) for i in indices]


def leave_one_out(
    model: Any, tokens: torch.Tensor, chosen: Sequence[Unit], **options: Any
) -> dict[Unit, float]:
    losses = RemovalLoss(model, tokens, **options)([frozenset({unit}) for unit in chosen])
    return dict(zip(chosen, losses, strict=True))


@pytest.mark.parametrize(("name", "attention"), [("llama", "self_attn"), ("gpt2", "attn")])
def test_parts_of_blocks(name: str, attention: str, family: Callable[[str], Any]) -> None:
    model = family(name)
    parts = {
        (kind, i): getattr(block, child)
        for i, block in enumerate(find_blocks(model))
        for kind, child in (("attention", attention), ("mlp", "mlp"))
    }
    loss = RemovalLoss(model, TOKENS, parts=parts)
    both, block, mixed = loss(
        [
            frozenset({("attention", 2), ("mlp", 2)}),
            frozenset({("block", 2)}),
            frozenset({("block", 2), ("attention", 4)}),
        ]
    )
    assert both == block > 0

    def silence(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    with torch.no_grad(), skipping(model, set()):
        full = model(TOKENS).logits.log_softmax(-1)
        hook = parts["attention", 4].register_forward_hook(silence)
        with skipping(model, {2}):
            pruned = model(TOKENS).logits.log_softmax(-1)
        hook.remove()
    expected = float((full.exp() * (full - pruned)).sum(-1).mean())
    assert mixed == pytest.approx(expected, rel=1e-4)


def test_a_budget_takes_the_first_sequences(family: Callable[[str], Any]) -> None:
    model, removal = family("llama"), frozenset({("block", 3)})
    loss = RemovalLoss(model, TOKENS)
    first = RemovalLoss(model, TOKENS[:2])([removal])
    assert loss([removal], 41) == loss([removal], 80) == first != loss([removal])
    assert loss([removal], 10**9) == loss([removal])
    assert loss([]) == []


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_by_sequence_each_is_alone(metric: str, family: Callable[[str], Any]) -> None:
    model = family("llama")
    sets = [frozenset({("block", 3)}), frozenset({("block", 1), ("block", 4)})]
    loss = RemovalLoss(model, TOKENS, metric=metric)
    rows = loss.by_sequence(sets)
    alone = [RemovalLoss(model, row[None], metric=metric) for row in TOKENS]
    assert rows == [[each.by_sequence([one])[0][0] for each in alone] for one in sets]
    means = [sum(row) / len(row) for row in rows]
    assert loss(sets) == (means if metric == "kl" else [math.exp(mean) for mean in means])
    assert loss.by_sequence(sets[:1], 41) == [rows[0][:2]]


def test_blocks_are_not_run_again_for_what_is_known(family: Callable[[str], Any]) -> None:
    model = family("llama")
    runs = [0] * 6
    counters = [
        block.mlp.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
        for i, block in enumerate(find_blocks(model))
    ]
    leave_one_out(model, TOKENS[:1], BLOCKS)
    for counter in counters:
        counter.remove()
    assert runs == [1 + i for i in range(6)]  # the full model, and after each earlier block


def test_memory_does_not_grow_with_the_sequences(family: Callable[[str], Any]) -> None:
    """Between two sequences nothing of the size of the logits is held."""
    model, seen = family("llama"), []
    size = TOKENS.shape[1] * model.config.vocab_size

    def count(*_: Any) -> None:
        gc.collect()
        seen.append(
            sum(
                issubclass(type(each), torch.Tensor) and each.numel() >= size
                for each in gc.get_objects()
            )
        )

    hook = find_blocks(model)[0].mlp.register_forward_hook(count)
    RemovalLoss(model, TOKENS)([frozenset({("block", 0)}), frozenset()])
    hook.remove()
    assert len(seen) == 3
    assert max(seen) == seen[0]


def test_the_model_is_left_as_it_was(family: Callable[[str], Any]) -> None:
    model = family("llama")
    before = model(TOKENS).logits

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("boom")

    find_blocks(model)[5].forward = broken
    with pytest.raises(RuntimeError, match="boom"):
        leave_one_out(model, TOKENS, BLOCKS[:2])
    assert find_blocks(model)[5].forward is broken
    del find_blocks(model)[5].forward
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(TOKENS).logits, before)


def test_a_block_that_adds_in_place_spoils_nothing(family: Callable[[str], Any]) -> None:
    model = family("llama")
    parts = {
        (kind, i): getattr(block, child)
        for i, block in enumerate(find_blocks(model))
        for kind, child in (("attention", "self_attn"), ("mlp", "mlp"))
    }
    every = [*BLOCKS, *parts]
    whole = leave_one_out(model, TOKENS, every, parts=parts)
    for block in find_blocks(model):
        original = type(block).forward

        def forward(state: Any, *args: Any, run: Any = original, of: Any = block, **kw: Any) -> Any:
            return state.copy_(run(of, state.clone(), *args, **kw))

        block.forward = forward
    in_place = leave_one_out(model, TOKENS, every, parts=parts)
    for block in find_blocks(model):
        del block.forward
    assert in_place == whole


def test_each_unit_gets_its_own_loss(family: Callable[[str], Any]) -> None:
    model = family("llama")
    chosen = [("block", 4), ("block", 1)]
    scores = leave_one_out(model, TOKENS, chosen, metric="perplexity")
    assert list(scores) == chosen
    for unit, score in scores.items():
        assert score == pytest.approx(plain_loss(model, TOKENS, {unit[1]}, "perplexity"), rel=1e-5)


def test_what_is_not_finite(family: Callable[[str], Any]) -> None:
    model = family("llama")
    weight = find_blocks(model)[2].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="logits are not finite"):
        leave_one_out(model, TOKENS, BLOCKS)
    with torch.no_grad():
        weight.copy_(kept)
    ran = []

    def fail(module: Any, args: Any, output: Any) -> Any:
        return output if ran else output * torch.nan

    blocks = find_blocks(model)
    hooks = [
        blocks[2].mlp.register_forward_hook(lambda *_: ran.append(1)),
        blocks[3].mlp.register_forward_hook(fail),
        blocks[5].mlp.register_forward_hook(lambda *_: ran.clear()),
    ]
    for metric in ("kl", "perplexity"):
        scores = leave_one_out(model, TOKENS, [("block", 2), ("block", 3)], metric=metric)
        assert scores["block", 2] == math.inf > scores["block", 3]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("options", "removal", "message"),
    [
        ({"metric": "kll"}, ("block", 0), "no such metric, got kll; did you mean 'kl'"),
        ({}, ("block", 6), "no such unit to remove, got block 6"),
        ({}, ("mlp", 1), "got mlp 1, expected one of 6 blocks or 0 parts"),
    ],
)
def test_refusals(
    options: dict[str, Any], removal: Unit, message: str, family: Callable[[str], Any]
) -> None:
    with pytest.raises(BadInput, match=message):
        leave_one_out(family("llama"), TOKENS, [removal], **options)
