from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.quant.qtensor import Scheme
from compress.quant.rate import sqnr
from compress.quant.rtn import fitting_group, quantize_rtn

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def steps(quantized: object) -> torch.Tensor:
    """The step of every weight, float64."""
    scale = quantized.scale.double()  # type: ignore[attr-defined]
    return scale.repeat_interleave(quantized.codes.shape[1] // scale.shape[1], 1)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 4, 12]),
    symmetric=st.booleans(),
    stored=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    shift=st.floats(-3, 3),
    log2_size=st.integers(-12, 12),
    seed=st.integers(0, 999),
)
def test_every_weight_is_within_half_a_step(
    bits: int,
    group: int | None,
    symmetric: bool,
    stored: torch.dtype,
    rows: int,
    shift: float,
    log2_size: int,
    seed: int,
) -> None:
    w = (normal(rows, 24, seed) * 50 + shift) * 2.0**log2_size
    quantized = quantize_rtn(w, Scheme(bits, group, symmetric), stored)
    error = (quantized.dense(torch.float32).double() - w).abs()
    # float32 rounds the quotient and the product
    assert (error <= steps(quantized) * 0.5 + w.abs().max() * 1e-6).all()
    lowest, highest = -(1 << bits - 1), (1 << bits - 1) - 1
    assert quantized.codes.min() >= lowest + symmetric
    assert quantized.codes.max() <= highest
    assert (quantized.zero is None) == symmetric
    if quantized.zero is not None:
        assert quantized.zero.min() >= lowest
        assert quantized.zero.max() <= highest
    assert quantized.scale.dtype == stored
    assert quantized.scale.shape == (rows, 24 // (group or 24))


def test_by_hand() -> None:
    w = torch.tensor([[7.0, -3.4, 0.6, 0.0], [-1.1, 2.0, 14.0, 5.0]])
    symmetric = quantize_rtn(w, Scheme(4, 2, True), torch.float32)
    assert symmetric.scale.tolist() == [[1.0, pytest.approx(0.6 / 7)], [pytest.approx(2 / 7), 2.0]]
    assert symmetric.codes.tolist() == [[7, -3, 7, 0], [-4, 7, 7, 2]]
    asymmetric = quantize_rtn(w, Scheme(4, None, False), torch.float32)
    assert asymmetric.zero is not None
    assert asymmetric.scale.flatten().tolist() == [
        pytest.approx(10.4 / 15),
        pytest.approx(15.1 / 15),
    ]
    assert asymmetric.zero.flatten().tolist() == [-3, -7]
    assert asymmetric.codes.tolist() == [[7, -8, -2, -3], [-8, -5, 7, -2]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_bit_adds_six_decibels(symmetric: bool) -> None:
    w = normal(64, 512)
    found = [sqnr(w, quantize_rtn(w, Scheme(b, 64, symmetric), torch.float32)) for b in range(4, 9)]
    gains = [more - less for less, more in pairwise(found)]
    assert all(gain == pytest.approx(20 * math.log10(2), abs=0.7) for gain in gains)
    peak = w.view(64, -1, 64).abs().amax(2).double()
    theory = 10 * math.log10(float(w.double().square().mean() * 12 / (peak / 127).square().mean()))
    if symmetric:
        assert found[-1] == pytest.approx(theory, abs=0.1)


def test_integers_of_the_range_come_back_exactly() -> None:
    w = torch.arange(-7, 8).float().repeat(3, 1)
    assert quantize_rtn(w, Scheme(4, None, True), torch.bfloat16).dense(torch.float32).equal(w)
    w = torch.arange(0, 16).float().repeat(3, 1)
    assert quantize_rtn(w, Scheme(4, None, False), torch.bfloat16).dense(torch.float32).equal(w)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_stay_zeros(symmetric: bool, stored: torch.dtype) -> None:
    w = torch.zeros(3, 8)
    w[1] = 0.5
    quantized = quantize_rtn(w, Scheme(4, None, symmetric), stored)
    dense = quantized.dense(torch.float32)
    assert (quantized.scale > 0).all()
    assert dense[[0, 2]].eq(0).all()
    assert dense[1].sub(0.5).abs().max() < 0.005


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [1, 7])
def test_one_column_and_odd_widths(columns: int, symmetric: bool) -> None:
    w = normal(5, columns)
    quantized = quantize_rtn(w, Scheme(8, None, symmetric), torch.float32)
    assert ((quantized.dense(torch.float32) - w).abs() <= steps(quantized) * 0.5001).all()


@pytest.mark.parametrize("stored", DTYPES)
def test_weights_below_what_a_scale_can_hold(stored: torch.dtype) -> None:
    w = normal(4, 32) * torch.finfo(stored).tiny
    dense = quantize_rtn(w, Scheme(8, None, False), stored).dense(torch.float32)
    assert dense.isfinite().all()
    assert (dense - w).abs().max() <= torch.finfo(stored).tiny / 2


def test_weights_above_what_a_scale_can_hold() -> None:
    w = normal(4, 32) * 1e9
    with pytest.raises(BadInput, match=r"the\.weight: a scale is too large.*bfloat16"):
        quantize_rtn(w, Scheme(4, None, True), torch.float16, name="the.weight")
    extreme = torch.full((2, 4), torch.finfo(torch.float32).max)
    extreme[:, 0] *= -1
    for symmetric in (True, False):
        quantized = quantize_rtn(extreme, Scheme(8, None, symmetric), torch.bfloat16)
        assert int(quantized.codes.max()) - int(quantized.codes.min()) >= 250


@pytest.mark.parametrize(
    ("columns", "wanted", "size"),
    [
        *((576, 128, 64), (576, 64, 64), (96, 128, 32), (1536, 128, 128), (80, 64, 16)),
        *((1000, 100, 100), (300, 100, 100), (48, 48, 48), (14336, 256, 256), (8, 4, 4)),
    ],
)
def test_the_largest_group_that_fits(columns: int, wanted: int, size: int) -> None:
    assert fitting_group(columns, wanted) == size


@pytest.mark.parametrize(("columns", "wanted"), [(577, 128), (24, 64), (63, 2), (64, 0), (64, -1)])
def test_no_group_that_fits(columns: int, wanted: int) -> None:
    with pytest.raises(BadInput, match=f"divides {columns} columns"):
        fitting_group(columns, wanted)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(BadInput, match=r"the\.weight: groups of 64 do not divide 80 columns"):
        quantize_rtn(normal(4, 80), Scheme(4, 64, True), torch.float16, name="the.weight")


def test_large_matrices_are_done_in_parts_with_the_same_result() -> None:
    w = normal(300, 4096)
    whole = quantize_rtn(w, Scheme(4, 64, False), torch.bfloat16)
    rows = quantize_rtn(w[250:300], Scheme(4, 64, False), torch.bfloat16)
    assert whole.codes[250:].equal(rows.codes)
    assert whole.zero is not None
    assert rows.zero is not None
    assert whole.zero[250:].equal(rows.zero)
    assert whole.scale[250:].equal(rows.scale)
