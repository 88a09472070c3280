"""Packed weights as tensors and operators: exact to the bit, known to autograd and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from compress.errors import BadInput, Corrupt
from compress.hf.packed import forms, ops

Make = Callable[..., torch.Tensor]


def made(tensor: torch.Tensor, form: str) -> tuple[torch.Tensor, list[int]]:
    packed = forms.pack(tensor, form, smaller=False)
    assert packed is not None
    return packed


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_word_comes_back(form: str, dtype: torch.dtype) -> None:
    words = torch.arange(1 << 16).to(torch.uint16).view(torch.int16).view(256, 256)
    tensor = words[torch.randperm(256, generator=torch.Generator().manual_seed(0))].view(dtype)
    packed, ints = made(tensor, form)
    assert packed.dtype == torch.uint8
    assert ints[2:5] == [256, 256, packed.numel()]
    assert forms.check(packed) == ints
    assert (forms.form_of(ints), forms.dtype_of(ints)) == (form, dtype)
    assert same(ops.unpack(packed, ints, 0, 256), tensor)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_rows_of_any_shape(data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 140))
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - first))
    tensor = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).bfloat16()
    for form in forms.FORMS:
        assert same(ops.unpack(*made(tensor, form), first, count), tensor[first : first + count])


def test_rows_of_a_stored_weight_of_many_segments(weight: Make) -> None:
    tensor = weight(3000, 1024)
    packed, ints = made(tensor, "stored")
    for first, count in ((0, 1), (1023, 2), (1024, 1024), (2999, 1), (1, 2999)):
        assert same(ops.unpack(packed, ints, first, count), tensor[first : first + count])
    ids = torch.tensor([[0, 2999], [1024, 0]], dtype=torch.int32)
    assert same(ops.embedding(ids, packed, ints), tensor[ids])


def test_only_the_segments_that_are_asked_for_are_decoded(weight: Make) -> None:
    tensor = weight(3000, 1024)
    packed, ints = made(tensor, "stored")
    packed[len(packed) // 10] ^= 1  # in the first of three segments
    assert same(ops.embedding(torch.tensor([1500]), packed, ints), tensor[[1500]])
    with pytest.raises(Corrupt):
        ops.embedding(torch.tensor([0]), packed, ints)


def test_lent_memory_is_used_again_and_by_nobody_else(weight: Make) -> None:
    large, small = weight(300, 64), weight(40, 64)
    with forms.lent_rows(*made(large, "stored"), 0, 300) as first:
        assert same(first, large)
        place = first.data_ptr()
        with forms.lent_rows(*made(small, "stored"), 0, 40) as other:
            assert same(other, small)
            assert not place <= other.data_ptr() < place + large.nbytes
        assert same(first, large)
    with forms.lent_rows(*made(small, "stored"), 0, 40) as again:
        assert same(again, small)
        assert again.data_ptr() == place


def test_products_keep_nothing_that_is_lent(weight: Make) -> None:
    tensors, x = [weight(64, 64), -weight(64, 64)], weight(1, 64)
    products = [ops.linear(x, *made(tensor, "stored"), None, 0, 64, False) for tensor in tensors]
    for tensor, product in zip(tensors, products, strict=True):
        assert same(product, functional.linear(x, tensor))


def test_threads_multiply_side_by_side(weight: Make) -> None:
    tensors, x = [weight(256, 64) * scale for scale in (1, 2, -1, 4)], weight(3, 64)
    given = [made(tensor, "stored") for tensor in tensors]

    def product(i: int) -> torch.Tensor:
        return ops.linear(x, *given[i % 4], None, 0, 256, False)

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(product, range(64))):
            assert same(found, functional.linear(x, tensors[i % 4]))


def test_a_tensor_of_experts_is_a_matrix_of_all_their_rows(form: str, weight: Make) -> None:
    tensor = weight(4, 33, 20)
    packed, ints = made(tensor, form)
    assert ints[2:4] == [132, 20]
    assert same(ops.unpack(packed, ints, 66, 33), tensor[2])


@pytest.mark.parametrize("shape", [(20,), (1, 20), (3, 20), (2, 5, 20), (0, 20)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_dense_weight(
    form: str, weight: Make, shape: tuple[int, ...], biased: bool
) -> None:
    tensor, x = weight(70, 20), weight(*shape, seed=1)
    bias = weight(70, seed=2) if biased else None
    for fused in (False, True):  # which changes nothing without a GPU
        y = ops.linear(x, *made(tensor, form), bias, 0, 70, fused)
        assert same(y, functional.linear(x, tensor, bias))
    part = ops.linear(x, *made(tensor, form), None, 32, 20, False)
    assert same(part, functional.linear(x, tensor[32:52]))


def test_gradients_are_those_of_the_dense_weight(form: str, weight: Make) -> None:
    tensor = weight(70, 20)
    packed, ints = made(tensor, form)
    grads = []
    for packs in (True, False):
        x = weight(2, 5, 20, seed=1).requires_grad_()
        bias = weight(70, seed=2).requires_grad_()
        y = (
            ops.linear(x, packed, ints, bias, 0, 70, False)
            if packs
            else functional.linear(x, tensor, bias)
        )
        y.backward(weight(2, 5, 70, seed=3))
        assert x.grad is not None
        assert bias.grad is not None
        grads.append((x.grad, bias.grad))
    (x, bias), (dense_x, dense_bias) = grads
    assert same(x, dense_x)
    assert torch.allclose(bias.float(), dense_bias.float(), atol=1e-3)


def test_nothing_dense_is_kept_for_the_backward_pass(form: str, weight: Make) -> None:
    kept: list[torch.Tensor] = []
    packed, ints = made(weight(70, 20), form)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.linear(weight(3, 20).requires_grad_(), packed, ints, None, 0, 70, False)
    assert {tensor.dtype for tensor in kept} == {torch.uint8}


@pytest.mark.slow
def test_the_operators_are_what_torch_asks_of_them(form: str, weight: Make) -> None:
    packed, ints = made(weight(70, 20), form)
    x, bias = weight(3, 20, seed=1).requires_grad_(), weight(70, seed=2).requires_grad_()
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.unpack, (packed, ints, 32, 10)),
        (ops.linear, (x, packed, ints, bias, 0, 70, False)),
        (ops.linear, (x.detach(), packed, ints, None, 32, 38, True)),
        (ops.embedding, (torch.tensor([[3, 69]]), packed, ints)),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args)


def test_under_autocast(form: str, weight: Make) -> None:
    tensor, x = weight(70, 20), weight(3, 20, seed=1).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, *made(tensor, form), None, 0, 70, False)
        assert same(y, functional.linear(x, tensor))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_compiled_under_autocast(dtype: torch.dtype, weight: Make) -> None:
    tensor, x = weight(70, 20), weight(3, 20, seed=1).float()
    bias, (packed, ints) = weight(70, seed=2).float(), made(tensor, "fast")

    @torch.compile(backend="aot_eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, packed, ints, bias, 0, 70, False)

    with torch.autocast("cpu", dtype):
        assert same(compiled(x), functional.linear(x, tensor, bias))
        assert same(ops.linear(x, packed, ints, bias, 0, 70, False), compiled(x))


def test_a_lookup_under_autocast_of_another_dtype(form: str, weight: Make) -> None:
    tensor, ids = weight(70, 20), torch.tensor([[69, 3], [40, 3]])
    with torch.autocast("cpu", torch.float16):
        assert same(ops.embedding(ids, *made(tensor, form)), tensor[ids])


@pytest.mark.parametrize("bad", [-1, 70])
def test_an_id_that_is_no_row(form: str, weight: Make, bad: int) -> None:
    packed, ints = made(weight(70, 20), form)
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([0, bad]), packed, ints)
    assert ops.embedding(torch.empty(2, 0, dtype=torch.long), packed, ints).shape == (2, 0, 20)


def test_what_is_not_packed(weight: Make) -> None:
    random = torch.randint(-(1 << 15), 1 << 15, (64, 128)).to(torch.int16).view(torch.bfloat16)
    for tensor in (weight(64, 128).float(), weight(64), weight(0, 5), random):
        assert all(forms.pack(tensor, form) is None for form in forms.FORMS)
    with pytest.raises(BadInput, match="'fsat' of packed weights; did you mean 'fast'"):
        forms.pack(weight(64, 128), "fsat")


def test_every_damaged_byte_is_found(form: str, weight: Make) -> None:
    packed, _ = made(weight(8, 40), form)
    for place in range(0, packed.numel(), 7):
        damaged = packed.clone()
        damaged[place] ^= 16
        with pytest.raises((Corrupt, BadInput)):
            forms.check(damaged, "w")
    with pytest.raises(Corrupt, match="^w: "):
        forms.check(packed[:-17], "w")
    with pytest.raises(Corrupt, match="got bfloat16"):
        forms.check(weight(8, 40), "w")


def test_the_bytes_of_a_file(weight: Make) -> None:
    packed, ints = made(weight(8, 400), "stored")
    assert forms.from_stored(packed) == (packed, ints)
    assert forms.from_stored(made(weight(1, 8), "stored")[0]) is None  # the header is larger


@pytest.mark.parametrize(
    ("form", "properties"),
    [
        ("fast", (3_201_000, 6144, 1_980_000, 132)),  # H200
        ("fast", (1_512_000, 5120, 1_410_000, 108)),  # A100
        ("dense", (10_501_000, 384, 2_520_000, 128)),  # RTX 4090
        ("fast", (0, 0, 0, 100)),  # a driver that does not tell
    ],
)
def test_the_form_for_a_device(
    form: str, properties: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("memory_clock_rate", "memory_bus_width", "clock_rate", "multi_processor_count")
    gpu = SimpleNamespace(**dict(zip(names, properties, strict=True)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert forms.form_for(torch.device("cuda", 1), torch.bfloat16) == form
    assert forms.form_for(torch.device("cuda", 1), torch.float16) == "dense"
    assert forms.form_for(torch.device("cpu"), torch.float16) == "stored"


def test_why_fp16_is_not_packed_fast(weight: Callable[..., torch.Tensor]) -> None:
    tensor = weight(256, 256, dtype=torch.float16)
    assert forms.pack(tensor, "fast") is None
    assert forms.pack(tensor, "dense") is not None


@pytest.mark.slow
def test_on_a_gpu(gpu: list[str], weight: Make) -> None:
    tensor, x = weight(70, 150), weight(2, 3, 150, seed=1)
    for form in ("fast", "dense"):
        packed, ints = made(tensor, form)
        assert same(ops.unpack(packed, ints, 40, 25), tensor[40:65])
        ids = torch.tensor([[69, 0]])
        assert same(ops.embedding(ids, packed, ints), tensor[ids])
        exact = functional.linear(x, tensor)
        assert same(ops.linear(x, packed, ints, None, 0, 70, False), exact)
        gpu.clear()
        fused = ops.linear(x, packed, ints, None, 0, 70, True)
        assert gpu == [f"linear_{form}_bf16_8"]
        assert torch.allclose(fused.double(), x.double() @ tensor.double().T, atol=2e-3)
        many = ops.linear(weight(9, 150), packed, ints, None, 0, 70, True)
        assert same(many, functional.linear(weight(9, 150), tensor))
    with pytest.raises(BadInput, match="'stored' is for weights on the CPU"):
        forms.pack(tensor, "stored")
