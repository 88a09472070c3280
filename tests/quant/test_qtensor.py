from __future__ import annotations

import pytest
import torch

from compress.errors import BadInput
from compress.quant.ecsq import quantize_ecsq
from compress.quant.qtensor import QTensor, Scheme, stored_scale
from compress.quant.rtn import quantize_rtn

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def library_dense(quantized: QTensor, dtype: torch.dtype) -> torch.Tensor:
    """What compressed-tensors makes of the stored tensors in a model of ``dtype``."""
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scheme = quantized.scheme
    args = library.QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        strategy="channel" if scheme.group is None else "group",
        group_size=scheme.group,
        symmetric=scheme.symmetric,
    )
    return dequantize(quantized.codes, quantized.scale.to(dtype), quantized.zero, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16), (3, None), (2, 32)])
def test_dense_is_the_library_s_to_the_bit(
    bits: int, group: int | None, symmetric: bool, stored: torch.dtype, dtype: torch.dtype
) -> None:
    quantized = quantize_rtn(normal(24, 96), Scheme(bits, group, symmetric), stored)
    ours, theirs = quantized.dense(dtype), library_dense(quantized, dtype)
    assert ours.dtype == theirs.dtype == dtype
    assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_of_ecsq_is_the_library_s_to_the_bit(dtype: torch.dtype) -> None:
    quantized = quantize_ecsq(normal(24, 96), 0.3, torch.bfloat16)
    assert quantized.dense(dtype).equal(library_dense(quantized, dtype))


def test_what_the_library_packs_it_unpacks_to_the_same_codes() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in range(2, 9):
        for symmetric in (True, False):
            q = quantize_rtn(normal(10, 48), Scheme(bits, 16, symmetric), torch.float16)
            packed = helpers.pack_to_int32(q.codes, bits)
            assert helpers.unpack_from_int32(packed, bits, q.codes.shape).equal(q.codes)
            if q.zero is not None:
                packed = helpers.pack_to_int32(q.zero, bits, packed_dim=0)
                shape = q.zero.shape
                assert helpers.unpack_from_int32(packed, bits, shape, packed_dim=0).equal(q.zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scales_are_the_next_number_up(dtype: torch.dtype) -> None:
    exact = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored = stored_scale(exact, dtype, "w").double()
    assert (stored >= exact).all()
    assert (stored - exact <= torch.finfo(dtype).eps * stored).all()
    numbers = torch.tensor([0.5, 1.0, 3.0], dtype=dtype)
    assert stored_scale(numbers.double(), dtype, "w").equal(numbers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scales_are_normal_or_refused(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    small = torch.tensor([0.0, limits.tiny / 3], dtype=torch.float64)
    assert (stored_scale(small, dtype, "w") == limits.tiny).all()
    assert stored_scale(torch.tensor([limits.max], dtype=torch.float64), dtype, "w").isfinite()
    with pytest.raises(BadInput, match=r"the\.weight: a scale is too large .* bfloat16"):
        stored_scale(torch.tensor([1.0, limits.max * 1.01]).double(), dtype, "the.weight")


def test_scales_of_other_dtypes_are_refused() -> None:
    with pytest.raises(BadInput, match="float8_e4m3fn"):
        stored_scale(torch.ones(1).double(), torch.float8_e4m3fn, "w")


@pytest.mark.parametrize(("bits", "group"), [(1, None), (9, None), (4, 0), (4, -1)])
def test_schemes_that_cannot_be_are_refused(bits: int, group: int | None) -> None:
    with pytest.raises(BadInput):
        Scheme(bits, group, True)


@pytest.mark.parametrize(
    "w", [torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(0, 4), torch.zeros(4, 0)]
)
def test_only_matrices_with_weights_are_quantized(w: torch.Tensor) -> None:
    for quantize in (
        lambda: quantize_rtn(w, Scheme(4, None, True), torch.float32, name="the.weight"),
        lambda: quantize_ecsq(w, 0.3, torch.float32, name="the.weight"),
    ):
        with pytest.raises(BadInput, match=r"the\.weight"):
            quantize()
    with pytest.raises(BadInput, match="int64"):
        quantize_ecsq(torch.ones(2, 2, dtype=torch.int64), 0.3, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_are_refused_by_name_and_row(
    bad: float, dtype: torch.dtype
) -> None:
    w = normal(40, 32_768).to(dtype)  # more than one part
    w[37, 5] = bad
    schemes = [Scheme(8, None, True), Scheme(4, 64, False)]
    for quantize in (
        lambda: quantize_rtn(w, schemes[0], torch.float32, name="the.weight"),
        lambda: quantize_rtn(w, schemes[1], torch.float32, name="the.weight"),
        lambda: quantize_ecsq(w, 0.3, torch.float32, name="the.weight"),
    ):
        with pytest.raises(BadInput, match=r"the\.weight, row 37: holds NaN or infinity"):
            quantize()


def test_parameters_are_quantized_without_their_gradients() -> None:
    w = torch.nn.Parameter(normal(4, 16))
    for quantized in (
        quantize_ecsq(w, 0.3, torch.float32),
        quantize_rtn(w, Scheme(4, None, False), torch.float32),
    ):
        assert not quantized.scale.requires_grad
        assert not quantized.dense(torch.float32).requires_grad


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    w, before = normal(400, 2048), torch.get_num_threads()
    one = quantize_ecsq(w, 0.3, torch.bfloat16, rdo=0.1)
    try:
        torch.set_num_threads(threads)
        other = quantize_ecsq(w, 0.3, torch.bfloat16, rdo=0.1)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert one.codes.equal(other.codes)
    assert one.scale.equal(other.scale)
