from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import codec
from compress.quant.ecsq import quantize_ecsq
from compress.quant.qtensor import Scheme
from compress.quant.rate import Rate, count_codes, sqnr
from compress.quant.rtn import quantize_rtn


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def coded_bits(codes: torch.Tensor) -> int:
    data = codes.contiguous().view(torch.uint8).flatten().numpy()
    pieces = codec.encode("w", "I8", tuple(codes.shape), [data])
    return 8 * sum(memoryview(piece).nbytes for piece in pieces)


def huffman_bits(codes: torch.Tensor) -> int:
    """Of all codes in one code of the codec's."""
    counts = count_codes(codes).tolist()
    lengths = codec.code_lengths(counts)
    assert max(lengths) <= 12
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


@pytest.mark.parametrize("c", [0.05, 0.31, 0.9, 3.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (300, 4000)])
def test_rate_is_what_the_codec_writes(c: float, shape: tuple[int, int]) -> None:
    quantized = quantize_ecsq(normal(*shape), c, torch.float16)
    rate = quantized.rate()
    assert rate.codes == coded_bits(quantized.codes)
    assert rate.weights == shape[0] * shape[1]
    assert rate.scales == 16 * shape[0]
    assert rate.zeros == 0


@pytest.mark.parametrize("c", [0.15, 0.31, 0.9])
def test_rate_is_the_limited_huffman_code_and_the_documented_overhead(c: float) -> None:
    quantized = quantize_ecsq(normal(1200, 1000), c, torch.float16)
    huffman = huffman_bits(quantized.codes)
    assert huffman <= quantized.rate().codes <= huffman + 0.006 * quantized.codes.numel()


def test_scales_and_zero_points_count() -> None:
    w = normal(64, 128)
    asymmetric = quantize_rtn(w, Scheme(4, 32, False), torch.bfloat16).rate()
    assert (asymmetric.scales, asymmetric.zeros) == (64 * 4 * 16, 64 * 4 * 4)
    assert quantize_rtn(w, Scheme(4, None, True), torch.float32).rate().scales == 64 * 32
    bits = asymmetric.codes + asymmetric.scales + asymmetric.zeros
    assert asymmetric.bits == bits
    assert asymmetric.bits_per_weight == bits / (64 * 128)


def test_rates_add_up() -> None:
    one, other = Rate(10, 20, 30, 40), Rate(1, 2, 3, 4)
    assert one + other == Rate(11, 22, 33, 44)
    assert Rate().bits_per_weight == 0


def test_a_grouped_quantizer_leaves_less_to_code() -> None:
    """Scales of groups have spent what coding would gain; at 4 bits a symmetric row is 3.0 bits."""
    w = normal(512, 1024)
    row = quantize_rtn(w, Scheme(4, None, True), torch.float16).rate()
    group = quantize_rtn(w, Scheme(4, 64, False), torch.float16).rate()
    assert row.codes / row.weights < 3.2 < 3.6 < group.codes / group.weights


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=300))
def test_counts_of_codes(values: list[int]) -> None:
    codes = torch.tensor([values], dtype=torch.int8)
    counts = count_codes(codes)
    assert all(counts[v % 256] == values.count(v) for v in set(values))
    assert counts.sum() == len(values)


def test_sqnr() -> None:
    w = torch.tensor([[1.0, 2.0, -2.0, 0.0]])
    quantized = quantize_ecsq(w, 0, torch.float32)
    # 1 is 63.5 steps of 2 / 127
    assert sqnr(w, quantized) == pytest.approx(10 * math.log10(9 / (1 / 127) ** 2), abs=0.01)
    coarse = quantize_rtn(w, Scheme(2, None, True), torch.float32)  # 2, 2 (or 0), -2, 0
    assert sqnr(w, coarse) == pytest.approx(10 * math.log10(9 / 1))
    assert sqnr(torch.zeros(2, 3), quantize_ecsq(torch.zeros(2, 3), 1, torch.float32)) == math.inf
