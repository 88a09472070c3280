"""From the entropy of queries to shares of layers and groups of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.errors import BadInput
from compress.signals import truncated_matrix_entropy
from compress.tokens.cache import compressing
from compress.tokens.cache_calibration import (
    calibrate_cache,
    high_heads,
    query_entropies,
    uncomp_shares,
)

TOKENS = torch.randint(10, 60, (2, 64), generator=torch.Generator().manual_seed(0))


def test_entropies_are_of_the_queries_of_each_head(make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llama").model
    caught: list[torch.Tensor] = []
    layer = model.model.layers[2].self_attn
    handle = layer.q_proj.register_forward_hook(lambda m, a, output: caught.append(output))
    found = query_entropies(model, TOKENS)
    handle.remove()
    assert found.shape == (5, 4)
    assert found.dtype == torch.float64
    # Tiny random models have no sinks but the first token.
    expected = [
        sum(truncated_matrix_entropy(queries[0, 1:, at : at + 8], 32) for queries in caught) / 2
        for at in range(0, 32, 8)
    ]
    assert found[2].tolist() == pytest.approx(expected)
    assert not model.model.layers[2]._forward_pre_hooks


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "llava"])
def test_other_families_have_queries_too(family: str, make_tiny: Callable[..., Any]) -> None:
    found = query_entropies(make_tiny(family).model, TOKENS)
    assert ((found > 0) & (found < 1)).all()


def test_stages_begin_where_entropy_falls() -> None:
    means = torch.tensor([0.90, 0.88, 0.84, 0.85, 0.80, 0.79])[:, None]
    shares = uncomp_shares(means + torch.tensor([-0.1, 0.1]))
    assert [round(shares.count(share)) for share in shares] == [2, 2, 2, 2, 2, 2]
    assert shares[0] > shares[2] > shares[4]
    assert sum(shares) == pytest.approx(6)
    assert uncomp_shares(torch.full((3, 2), 0.5)) == pytest.approx([1, 1, 1])


def test_the_half_of_the_heads_with_most_entropy_is_high() -> None:
    heads = torch.tensor([[0.1, 0.9, 0.4, 0.3, 0.7, 0.6], [0.2, 0.1, 0.5, 0.6, 0.3, 0.4]])
    assert high_heads(heads, 3) == ((2,), (1,))
    assert high_heads(heads, 6) == ((1, 4, 5), (2, 3, 5))
    assert high_heads(heads, 1) == ((), ())


@pytest.mark.parametrize("rule", ["uncomp", "pyramid", "uniform"])
@pytest.mark.parametrize("by_head", [False, True])
def test_rivals_hold_the_same_bytes(
    rule: Any, by_head: bool, make_tiny: Callable[..., Any]
) -> None:
    model = make_tiny("gpt_neox").model
    policy = calibrate_cache(model, TOKENS, 0.5, rule=rule, by_head=by_head)
    assert (policy.head_groups is not None) == by_head
    assert (policy.shares is None) == (rule == "uniform")
    with compressing(model, policy) as engine, torch.no_grad():
        model(torch.arange(10, 90)[None] % 60)
        assert engine.report is not None
        assert engine.report.share == 0.5
        if rule != "uniform":
            assert engine.report.slots[0] > engine.report.slots[-1]


def test_what_cannot_be_calibrated_is_refused(make_tiny: Callable[..., Any]) -> None:
    model = make_tiny("llama").model
    with pytest.raises(BadInput, match="did you mean 'uncomp'"):
        calibrate_cache(model, TOKENS, 0.5, rule="uncom")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="sequences"):
        query_entropies(model, TOKENS[0])
