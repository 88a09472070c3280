from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.quant.qat.fake_weight import FakeWeight
from compress.quant.qat.lsq import Lsq, least_squares_step
from compress.quant.qat.statsq import StatsQ
from compress.quant.qtensor import Scheme
from compress.quant.rate import sqnr
from compress.quant.rtn import quantize_rtn

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([Lsq, StatsQ]),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 4, 12]),
    stored=st.sampled_from(DTYPES),
    per_tensor=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_training_computes_with_is_what_is_stored(
    kind: type[FakeWeight],
    bits: int,
    group: int | None,
    stored: torch.dtype,
    per_tensor: bool,
    seed: int,
) -> None:
    """Gate G2: bit for bit, and after steps of training too."""
    w = normal(5, 24, seed)
    w[1] = 0
    fake = kind(w, Scheme(bits, group, True), stored, "w", per_tensor=per_tensor)  # type: ignore[call-arg]
    adam = torch.optim.AdamW(fake.parameters(), lr=0.01)
    for _ in range(3):
        (fake()[0] - w.roll(1, 0)).square().sum().backward()
        adam.step()
        adam.zero_grad()
    values, codes = fake()
    quantized = fake.qtensor()
    assert bits_of(quantized.dense(torch.float32)).equal(bits_of(values.detach()))
    assert quantized.codes.equal(codes)
    assert quantized.scale.dtype == stored
    assert quantized.scale.shape == (5, 24 // (group or 24))
    assert quantized.codes.abs().max() <= (1 << bits - 1) - 1
    assert not per_tensor or quantized.scale.unique().numel() == 1


def test_the_gradients_are_those_of_the_paper() -> None:
    """Equation 3, by hand: (code - ratio) inside, +-limit outside; weights 1 inside, 0 outside."""
    w = torch.tensor([[0.4, -2.6, 9.0, -50.0]])
    fake = Lsq(w, Scheme(3, None, True), torch.float32, "w", start=torch.ones(1, 1))
    fake()[0].sum().backward()
    assert fake.weight.grad is not None
    assert fake.weight.grad.tolist() == [[1, 1, 0, 0]]
    by_step = (0 - 0.4) + (-3 + 2.6) + 3 - 3
    assert fake.log_step.grad is not None
    assert float(fake.log_step.grad) == pytest.approx(by_step / math.sqrt(4 * 3), rel=1e-5)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_steps_alone_learn_to_lose_less(group: int | None, per_tensor: bool) -> None:
    w = normal(16, 64)
    wide = torch.full((16, 64 // (group or 64)), 0.04)
    fake = Lsq(w, Scheme(4, group, True), torch.float32, "w", per_tensor=per_tensor, start=wide)
    before = sqnr(w, fake.qtensor())
    adam = torch.optim.Adam([fake.log_step], lr=0.05)
    for _ in range(40):
        (fake()[0] - w).square().sum().backward()
        adam.step()
        adam.zero_grad()
    assert sqnr(w, fake.qtensor()) > before + 6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_first_steps_lose_less_than_those_that_clip_nothing(bits: int) -> None:
    w, scheme = normal(64, 256), Scheme(bits, None, True)
    first = sqnr(w, Lsq(w, scheme, torch.float32, "w").qtensor())
    assert first > sqnr(w, quantize_rtn(w, scheme, torch.float32)) + 0.3


def test_first_steps_of_zeros_and_of_tiny_and_huge_weights() -> None:
    groups = torch.stack([torch.zeros(8), torch.full((8,), 1e-44), torch.full((8,), 3e38)])
    steps = least_squares_step(groups, 7)
    assert steps.isfinite().all()
    assert (steps > 0).all()
    assert steps[0] == 1


def test_a_step_stays_positive_whatever_it_learns() -> None:
    fake = Lsq(normal(4, 8), Scheme(4, None, True), torch.bfloat16, "w")
    adam = torch.optim.Adam([fake.log_step], lr=5.0)
    for _ in range(20):
        fake.exact_step().sum().backward()
        adam.step()
        adam.zero_grad()
    assert (fake.qtensor().scale > 0).all()
    assert fake()[0].isfinite().all()


def test_statsq_clips_at_twice_the_mean_and_follows_the_weights() -> None:
    w = torch.tensor([[1.0, -1.0, 3.0, 0.0], [2.0, 2.0, 2.0, 10.0]])
    fake = StatsQ(w, Scheme(4, None, True), torch.float32, "w")
    quantized = fake.qtensor()
    assert quantized.scale.flatten().tolist() == pytest.approx([2.5 / 7, 8 / 7])
    assert quantized.codes.tolist() == [[3, -3, 7, 0], [2, 2, 2, 7]]
    fake()[0].sum().backward()
    assert fake.weight.grad is not None
    assert fake.weight.grad.tolist() == [[1, 1, 0, 1], [1, 1, 1, 0]]
    assert [name for name, _ in fake.named_parameters()] == ["weight"]
    with torch.no_grad():
        fake.weight.mul_(2)
    assert fake.qtensor().scale.flatten().tolist() == pytest.approx([5 / 7, 16 / 7])


@pytest.mark.parametrize(
    ("scheme", "start", "message"),
    [
        (Scheme(4, None, False), None, "the.weight: only symmetric codes can be trained"),
        (Scheme(4, 5, True), None, "the.weight: groups of 5 do not divide 8 columns"),
        (Scheme(4, None, True), torch.ones(4, 2), "no steps to start from, got [4, 2]"),
        (Scheme(4, None, True), torch.zeros(4, 1), "no steps to start from"),
    ],
)
def test_what_cannot_be_trained(scheme: Scheme, start: torch.Tensor | None, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        Lsq(normal(4, 8), scheme, torch.float32, "the.weight", start=start)
    assert message in str(caught.value)


def test_weights_that_are_not_finite_are_named() -> None:
    w = normal(4, 8)
    w[2, 3] = torch.nan
    with pytest.raises(BadInput, match=r"the\.weight, row 2: holds NaN"):
        Lsq(w, Scheme(4, None, True), torch.float32, "the.weight")
