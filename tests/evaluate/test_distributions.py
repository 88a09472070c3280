from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.evaluate.distributions import MEASURES, compare_logits


def pair(
    seed: int, tokens: int = 40, vocabulary: int = 30, scale: float = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of two models, and targets that each is often right about."""
    generator = torch.Generator().manual_seed(seed)
    a = scale * torch.randn(tokens, vocabulary, generator=generator)
    b = a + scale / 3 * torch.randn(tokens, vocabulary, generator=generator)
    chance = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets = torch.where(torch.arange(tokens) % 3 == 0, chance, a.argmax(1))
    return a, b, torch.where(torch.arange(tokens) % 3 == 1, b.argmax(1), targets)


def literal(
    reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor, top_k: int
) -> dict[str, float]:
    """Every definition, token by token in float64."""
    sums = dict.fromkeys(MEASURES, 0.0)
    for a, b, target in zip(reference.double(), candidate.double(), targets.tolist(), strict=True):
        p, q = a.softmax(0), b.softmax(0)
        m = (p + q) / 2
        sums["nll_reference"] -= p[target].log().item()
        sums["nll"] -= q[target].log().item()
        sums["kl"] += (p * (p / q).log()).sum().item()
        sums["jsd"] += ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() / 2
        order = p.argsort(descending=True)
        top, rest = order[:top_k], order[top_k:]
        sums["kl_top_k"] += (p[top] * (p[top] / q[top]).log()).sum().item()
        if len(rest):
            sums["kl_top_k"] += (p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()).item()
        sums["top1_agreement"] += int(p.argmax()) == int(q.argmax())
        sums["flip_rate"] += (int(p.argmax()) == target) != (int(q.argmax()) == target)
    return sums


@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("top_k", [1, 5, 30, 99])
def test_every_measure_is_its_definition(tokens: int, top_k: int) -> None:
    a, b, targets = pair(0, tokens)
    found, expected = compare_logits(a, b, targets, top_k), literal(a, b, targets, top_k)
    assert tuple(found) == MEASURES
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    if tokens == 40:
        assert 0 < found["flip_rate"] < 40
        assert 0 < found["top1_agreement"] < 40


def test_a_rest_far_below_the_step_of_float32_counts() -> None:
    a, b, targets = torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64)
    a[0, 0], b[0, 0] = 3, 30  # all but the first have 1e-12 together, times 3 nats and more
    found, expected = compare_logits(a, b, targets, 1), literal(a, b, targets, 1)
    assert found["kl_top_k"] == pytest.approx(expected["kl_top_k"], rel=1e-5)
    assert found["kl_top_k"] > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_does_not_differ_from_itself(dtype: torch.dtype) -> None:
    a, _, targets = pair(1)
    a = a.to(dtype)
    found = compare_logits(a, a, targets, 5)
    assert found["kl"] == found["kl_top_k"] == found["flip_rate"] == 0
    assert found["jsd"] == pytest.approx(0, abs=1e-5)
    assert found["top1_agreement"] == 40
    assert found["nll"] == found["nll_reference"]


def test_bfloat16_logits_are_compared_in_float32() -> None:
    a, b, targets = pair(2)
    a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    exact = literal(a, b, targets, 5)
    found = compare_logits(a, b, targets, 5)
    for name in ("nll_reference", "nll", "kl", "kl_top_k", "jsd"):
        assert found[name] == pytest.approx(exact[name], rel=1e-5)


def test_two_largest_logits_are_both_right() -> None:
    a = torch.tensor([[1.0, 5.0, 5.0]])
    for b in (torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[0.0, 4.0, 4.0]])):
        found = compare_logits(a, b, torch.tensor([2]), 1)
        assert found["flip_rate"] == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    scale=st.floats(0.01, 300),
    vocabulary=st.integers(2, 50),
    top_k=st.integers(1, 60),
)
def test_inequalities_that_always_hold(
    seed: int, scale: float, vocabulary: int, top_k: int
) -> None:
    tokens = 5
    a, b, targets = pair(seed, tokens, vocabulary, scale)
    found, back = compare_logits(a, b, targets, top_k), compare_logits(b, a, targets, top_k)
    slack = 1e-5 * tokens * max(scale, 1)
    assert -slack <= found["kl_top_k"] <= found["kl"] + slack  # data processing
    assert -slack <= found["jsd"] <= tokens * math.log(2) + slack
    assert found["jsd"] <= (found["kl"] + back["kl"]) / 4 + slack  # KL is convex
    assert back["jsd"] == pytest.approx(found["jsd"], abs=slack)
    assert back["flip_rate"] == found["flip_rate"]
    assert all(math.isfinite(value) for value in found.values())


def test_opposite_certainties_are_ln_2_apart() -> None:
    a, b = torch.eye(2)[:1] * 500, torch.eye(2)[1:] * 500
    found = compare_logits(a, b, torch.tensor([0]), 1)
    assert found["jsd"] == pytest.approx(math.log(2), rel=1e-5)
    assert found["kl"] == found["kl_top_k"] == pytest.approx(500)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_logit_that_is_not_finite_shows(value: float, which: int) -> None:
    a, b, targets = pair(3)
    (a, b)[which][17, 3] = value
    assert not math.isfinite(compare_logits(a, b, targets, 5)["kl"])


def test_the_sums_do_not_depend_on_the_threads() -> None:
    a, b, targets = pair(4, tokens=100)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            found.append(compare_logits(a, b, targets, 5))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert found[1:] == found[:1] * 3
