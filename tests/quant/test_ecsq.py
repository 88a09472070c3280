from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.quant.ecsq import quantize_ecsq
from compress.quant.qtensor import Scheme
from compress.quant.rate import count_codes, sqnr
from compress.quant.rtn import quantize_rtn

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Gaussian rows of unequal spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.02 * (0.5 * torch.randn(rows, 1, generator=generator)).exp()
    return torch.randn(rows, columns, generator=generator) * spread


def entropy(codes: torch.Tensor) -> float:
    shares = count_codes(codes).double() / codes.numel()
    return -float(shares.xlogy(shares).sum()) / math.log(2)


@pytest.mark.parametrize("c", [0.11, 0.22, 0.31, 0.44, 0.62, 0.9])
def test_gaussian_rows_have_the_entropy_and_the_noise_of_theory(c: float) -> None:
    w = normal(256, 1024)
    quantized = quantize_ecsq(w, c, torch.float32)
    of_uniform_noise = math.log2(1 + c**2 / 12) / 2  # which a rounded number has in addition
    theory = 2.047 - math.log2(c) + of_uniform_noise
    assert entropy(quantized.codes) == pytest.approx(theory, abs=0.005)
    assert sqnr(w, quantized) == pytest.approx(10 * math.log10(12 / c**2), abs=0.1)
    assert quantized.widened == 0


@settings(max_examples=60, deadline=None)
@given(
    c=st.floats(0, 5),
    stored=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    columns=st.integers(1, 40),
    shift=st.floats(-9, 9),
    outlier=st.floats(0, 1e4),
    seed=st.integers(0, 999),
)
def test_every_weight_is_within_half_a_step_and_no_code_is_clamped(
    c: float,
    stored: torch.dtype,
    rows: int,
    columns: int,
    shift: float,
    outlier: float,
    seed: int,
) -> None:
    w = normal(rows, columns, seed) + 0.02 * shift
    w[0, 0] += outlier
    quantized = quantize_ecsq(w, c, stored)
    error = (quantized.dense(torch.float32).double() - w).abs()
    assert (error <= quantized.scale.double() * 0.5 + w.abs().max() * 1e-6).all()
    assert quantized.codes.min() >= -127
    assert quantized.scheme == Scheme(8, None, True)
    assert quantized.scale.shape == (rows, 1)


def test_rows_whose_step_had_to_be_widened_are_counted() -> None:
    w = normal(10, 512)
    w[3, 7], w[6, 0] = 30.0, -40.0
    quantized = quantize_ecsq(w, 0.1, torch.float32)
    assert quantized.widened == 2
    assert quantized.codes[3, 7] == 127
    assert quantized.codes[6, 0] == -127
    others = [row for row in range(10) if row not in (3, 6)]
    alone = quantize_ecsq(w[others], 0.1, torch.float32)
    assert alone.widened == 0
    assert quantized.codes[others].equal(alone.codes)


@pytest.mark.parametrize("stored", DTYPES)
def test_steps_of_no_width_are_eight_bit_rounding_to_nearest(stored: torch.dtype) -> None:
    w = normal(20, 64)
    fine, rounded = quantize_ecsq(w, 0, stored), quantize_rtn(w, Scheme(8, None, True), stored)
    assert fine.codes.equal(rounded.codes)
    assert fine.scale.equal(rounded.scale)
    assert fine.widened == 0
    assert quantize_ecsq(w, 1e-9, stored).widened == 20


@pytest.mark.parametrize("stored", DTYPES)
def test_rows_of_zeros_and_rows_without_spread(stored: torch.dtype) -> None:
    w = torch.zeros(3, 16)
    w[1] = -0.75
    quantized = quantize_ecsq(w, 0.3, stored)
    assert quantized.codes.tolist() == [[0] * 16, [-127] * 16, [0] * 16]
    assert quantized.widened == 1
    assert (quantized.scale > 0).all()
    assert quantized.dense(torch.float32)[[0, 2]].eq(0).all()


@pytest.mark.parametrize("rdo", [0.0, 0.1])
def test_one_column(rdo: float) -> None:
    w = normal(50, 1)
    dense = quantize_ecsq(w, 0.3, torch.float32, rdo=rdo).dense(torch.float32)
    assert dense.allclose(w, rtol=1e-5)


@pytest.mark.parametrize("stored", DTYPES)
def test_weights_below_what_a_step_can_hold(stored: torch.dtype) -> None:
    tiny = torch.finfo(stored).tiny
    dense = quantize_ecsq(normal(4, 64) * tiny, 0.3, stored).dense(torch.float32)
    assert dense.isfinite().all()
    assert dense.abs().max() <= tiny


def test_weights_at_the_ends_of_float32() -> None:
    """Their squares are no float32 numbers, so that their spread must be found in wider ones."""
    plain = quantize_ecsq(normal(8, 64), 0.3, torch.float32)
    for exponent in (-100, 100):
        scaled = quantize_ecsq(normal(8, 64) * 2.0**exponent, 0.3, torch.float32)
        assert scaled.codes.equal(plain.codes)
        assert scaled.scale.equal(plain.scale * 2.0**exponent)
    with pytest.raises(BadInput, match=r"the\.weight: a scale is too large"):
        quantize_ecsq(normal(8, 64) * 2.0**100, 0.3, torch.float16, name="the.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_computed_in_float32(dtype: torch.dtype) -> None:
    w = normal(8, 64).to(dtype)
    one, other = (quantize_ecsq(x, 0.3, torch.bfloat16) for x in (w, w.float()))
    assert one.codes.equal(other.codes)
    assert one.scale.equal(other.scale)


def test_large_matrices_are_done_in_parts_with_the_same_result() -> None:
    w = normal(300, 4096)
    whole = quantize_ecsq(w, 0.3, torch.bfloat16)
    rows = quantize_ecsq(w[250:], 0.3, torch.bfloat16)
    assert whole.codes[250:].equal(rows.codes)
    assert whole.scale[250:].equal(rows.scale)


def test_rate_distortion_rounding_beats_wider_steps_at_low_rates() -> None:
    """Notes of 2.348 to 2.281 bits for 0.21 dB on real weights: wider steps would cost 0.45 dB."""
    w = normal(256, 1024)
    plain = quantize_ecsq(w, 0.9, torch.float32)
    chosen = quantize_ecsq(w, 0.9, torch.float32, rdo=0.1)
    moved = plain.codes != chosen.codes
    assert (plain.codes.abs() - chosen.codes.abs())[moved].eq(1).all()
    saved = entropy(plain.codes) - entropy(chosen.codes)
    assert saved > 0.05
    wider = quantize_ecsq(w, 0.9 * 2**saved, torch.float32)
    assert entropy(wider.codes) > entropy(chosen.codes) - 0.01
    assert sqnr(w, chosen) > sqnr(w, wider) + 0.05


def test_rate_distortion_rounding_is_the_minimum_it_claims() -> None:
    """Literally, weight by weight, with the frequencies that the third pass had."""
    w = normal(16, 64)
    scaled = w / quantize_ecsq(w, 1.0, torch.float32).scale
    codes = scaled.round()
    for _ in range(3):
        counts = {q: int((codes == q).sum()) for q in range(-130, 130)}
        bits = {q: -math.log2(max(1, n) / codes.numel()) for q, n in counts.items()}
        flat = []
        for x in scaled.flatten().tolist():
            near = round(x)
            choices = (near, near - (near > 0) + (near < 0))
            flat.append(min(choices, key=lambda q, x=x: (x - q) ** 2 + 0.2 * bits[q]))
        codes = torch.tensor(flat).view(w.shape)
    found = quantize_ecsq(w, 1.0, torch.float32, rdo=0.2)
    assert found.codes.equal(codes.to(torch.int8))


@pytest.mark.parametrize("options", [{"c": -0.1}, {"c": math.nan}, {"c": math.inf}])
def test_steps_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="^c: "):
        quantize_ecsq(normal(2, 4), scale_dtype=torch.float32, **options)
    with pytest.raises(BadInput, match="^rdo: "):
        quantize_ecsq(normal(2, 4), 0.3, torch.float32, rdo=options["c"])
