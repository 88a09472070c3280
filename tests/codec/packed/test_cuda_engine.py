"""Packed weights on "CUDA": the torch side with the emulator in the place of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from compress.codec import packed
from compress.codec.packed import cuda
from compress.codec.packed.selftest import awkward
from compress.errors import BadInput, Corrupt, Missing
from tests.codec.packed.emulated import shared_emulator
from tests.codec.packed.simt import Emulator

CPU = torch.device("cpu")


class Watched:
    """A launcher that keeps what it was asked, and lets ``spoil`` touch what kernels wrote."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.launched: list[tuple[str, int, int]] = []
        self.spoil: Callable[[str, Sequence[Any]], None] = lambda name, args: None

    def launch(self, name: str, grid: int, block: int, args: Sequence[Any]) -> None:
        self.launched.append((name, grid, block))
        self.emulator.launch(name, grid, block, args)
        self.spoil(name, args)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return shared_emulator(tmp_path_factory)


@pytest.fixture
def gpu(emulator: Emulator) -> Iterator[Watched]:
    watched = Watched(emulator)
    with cuda.register_launcher("cpu", watched):
        yield watched


def weight(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)


def test_the_self_test_of_awkward_words(gpu: Watched) -> None:
    chosen = {name: awkward()[name] for name in ("1 x 129", "33 x 17")}
    found = packed.self_test(CPU, chosen)
    assert found == packed.SelfTest(4 * (2 * 4 + 2 * 4), [])


@pytest.mark.slow
def test_the_self_test_of_all_awkward_words(gpu: Watched) -> None:
    assert len(awkward()) >= 30
    assert packed.self_test(CPU).faults == []


@pytest.mark.parametrize("kernel", ["linear_dense_bf16", "rows_dense"])
def test_the_self_test_finds_a_flipped_bit(kernel: str, gpu: Watched) -> None:
    def spoil(name: str, args: Sequence[Any]) -> None:
        if name.startswith(kernel):
            args[12 if kernel.startswith("linear") else 10].view(torch.int16).view(-1)[-1] ^= 1

    gpu.spoil = spoil
    found = packed.self_test(CPU, {"1 x 1": awkward()["1 x 1"]})
    expected = 8 if kernel.startswith("linear") else 2  # one dtype, or both
    assert len(found.faults) == expected
    assert all("dense" in fault and fault.endswith("from the CPU's") for fault in found.faults)


@pytest.mark.parametrize("layout", packed.LAYOUTS)
def test_packing_lets_no_damaged_blob_out(layout: str, gpu: Watched) -> None:
    def spoil(name: str, args: Sequence[Any]) -> None:
        if name.startswith("pack_write"):
            args[0][16 * args[1]] ^= 1

    gpu.spoil = spoil
    with pytest.raises(Corrupt, match=r"^layer\.0: does not unpack to what was packed"):
        cuda.pack(weight(40, 130), layout, "layer.0")


@pytest.mark.parametrize("layout", packed.LAYOUTS)
def test_packing_gives_the_cpu_s_bytes_whatever_the_strides(gpu: Watched, layout: str) -> None:
    given = weight(130, 70, torch.float16).T
    blob, planned = cuda.pack(given, layout)
    words = given.contiguous().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(blob.numpy(), packed.pack(words, "F16", layout))
    assert packed.check(blob.numpy()) == planned
    assert gpu.launched[0][0] == "pack_histogram"
    assert not gpu.launched[-1][0].startswith("pack")


def test_packing_refuses_what_the_cpu_refuses(gpu: Watched) -> None:
    with pytest.raises(BadInput, match=r"only 16-bit floats can be packed, got torch\.float32"):
        cuda.pack(torch.zeros(2, 2), "fast")
    with pytest.raises(BadInput, match="did you mean 'dense'"):
        cuda.pack(weight(2, 2), "dence")
    with pytest.raises(BadInput, match="an empty matrix"):
        cuda.pack(weight(0, 5), "fast")
    assert gpu.launched == []


@pytest.fixture
def blob(gpu: Watched) -> tuple[torch.Tensor, packed.Layout]:
    made = cuda.pack(weight(100, 200), "fast")
    gpu.launched.clear()
    return made


def test_products_are_the_dense_ones(
    gpu: Watched, blob: tuple[torch.Tensor, packed.Layout]
) -> None:
    for batch in (1, 5):
        x = weight(batch, 200)
        got = cuda.linear(x, *blob)
        assert got.shape == (batch, 100)
        exact = x.double() @ weight(100, 200).double().T
        assert (got.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert [name for name, *_ in gpu.launched] == ["linear_fast_bf16_1", "linear_fast_bf16_8"]


def test_a_product_of_strided_rows(gpu: Watched, blob: tuple[torch.Tensor, packed.Layout]) -> None:
    wide = weight(3, 400)
    assert torch.equal(cuda.linear(wide[:, ::2], *blob), cuda.linear(wide[:, ::2].clone(), *blob))


def test_what_a_product_cannot_take(gpu: Watched, blob: tuple[torch.Tensor, packed.Layout]) -> None:
    for x in (weight(9, 200), weight(0, 200), weight(1, 199), weight(1, 200, torch.float16)):
        with pytest.raises(ValueError, match=r"x must be torch\.bfloat16 of 1 to 8 rows of 200"):
            cuda.linear(x, *blob)
    for bias in (torch.zeros(100), weight(1, 99)[0]):
        with pytest.raises(ValueError, match=r"bias must be torch\.bfloat16 of 100"):
            cuda.linear(weight(1, 200), *blob, bias)
    assert gpu.launched == []


@pytest.mark.parametrize(
    ("first", "n"), [(31, 1), (-32, 32), (96, 5), (0, 101), (128, None), (0, 0)]
)
def test_only_rows_of_the_weight_can_be_asked_for(
    first: int, n: int | None, gpu: Watched, blob: tuple[torch.Tensor, packed.Layout]
) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        cuda.unpack(*blob, first, n)
    with pytest.raises(ValueError, match="multiple of 32"):
        cuda.linear(weight(1, 200), *blob, None, first, n)
    assert gpu.launched == []


def test_rows_have_the_shape_of_their_ids(
    gpu: Watched, blob: tuple[torch.Tensor, packed.Layout]
) -> None:
    ids = torch.tensor([[99, 0, 7], [7, 31, 32]], dtype=torch.int32)
    assert torch.equal(cuda.rows(ids, *blob), weight(100, 200)[ids.long()])
    assert cuda.rows(ids[:0], *blob).shape == (0, 3, 200)
    for wrong in (-1, 100):
        with pytest.raises(RuntimeError, match="no row"):
            cuda.rows(torch.tensor([0, wrong]), *blob)


def test_what_kernels_could_not_reach_is_refused(
    gpu: Watched, blob: tuple[torch.Tensor, packed.Layout]
) -> None:
    elsewhere = torch.device("meta")
    x, ids, bias = weight(1, 200), torch.tensor([0]), weight(1, 100)[0]
    for call in (
        lambda: cuda.linear(x.to(elsewhere), *blob),
        lambda: cuda.linear(x, *blob, bias.to(elsewhere)),
        lambda: cuda.rows(ids.to(elsewhere), *blob),
    ):
        with pytest.raises(RuntimeError, match="on one device, got meta and, the packed .* cpu"):
            call()
    odd = torch.empty(blob[1].nbytes + 1, dtype=torch.uint8)[1:].copy_(blob[0])
    with pytest.raises(ValueError, match="begin at a multiple of 16 bytes"):
        cuda.unpack(odd, blob[1])
    assert gpu.launched == []


@pytest.mark.parametrize(
    ("shape", "batch", "multiprocessors", "warps"),
    [
        ((4096, 4096), 1, 132, 32),
        ((28672, 4096), 1, 132, 16),
        ((4096, 14336), 2, 132, 16),
        ((4096, 14336), 4, 132, 16),
        ((4096, 300), 1, 132, 3),
        ((8192, 4096), 1, 128, 32),
        ((8224, 4096), 1, 128, 16),
    ],
)
def test_the_number_of_warps(
    shape: tuple[int, int], batch: int, multiprocessors: int, warps: int
) -> None:
    rows, cols = shape
    planned = packed.plan("fast", "BF16", rows, cols, 0)
    found = cuda._warps(planned.col_tiles, planned.row_tiles, batch, multiprocessors)
    assert found == warps


def test_the_seam_closes_behind_itself(emulator: Emulator) -> None:
    inner, outer = Watched(emulator), Watched(emulator)
    with cuda.register_launcher("cpu", outer):
        with cuda.register_launcher("cpu", inner):
            assert cuda.launcher(CPU) is inner
        assert cuda.launcher(CPU) is outer
    with pytest.raises(ValueError, match="CUDA devices, not on cpu"):
        cuda.launcher(CPU)
    if not torch.cuda.is_available():
        with pytest.raises(Missing):
            cuda.launcher(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu() -> None:
    assert packed.self_test(torch.device("cuda", 0)).faults == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_launches_are_captured_in_a_graph() -> None:
    device = torch.device("cuda", 0)
    blob, planned = cuda.pack(weight(512, 512).to(device), "fast")
    x = weight(1, 512).to(device)
    expected = cuda.linear(x, blob, planned), cuda.unpack(blob, planned)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cuda.linear(x, blob, planned), cuda.unpack(blob, planned)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))
