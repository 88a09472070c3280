"""Every CUDA kernel of packed weights, whole, on the emulator, against the codec of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.codec import native
from compress.codec.packed import LAYOUTS, Layout, pack, parse, plan, seal, tables
from tests.codec.packed.simt import Emulator, preload, shared_directory

pytestmark = pytest.mark.skipif(
    native.compiler() is None, reason="no C++ compiler to build the emulator with"
)
ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"BF16": (torch.bfloat16, "bf16", 2.0**-8), "F16": (torch.float16, "fp16", 2.0**-11)}
CANARY = 0x5A5A
PRODUCTS = [
    *((1, 1, 33, 300), (1, 32, 40, 600), (1, 4, 1, 1), (2, 3, 70, 520), (2, 16, 9, 90)),
    *((3, 3, 31, 129), (4, 1, 5, 100), (5, 16, 33, 260), (7, 2, 32, 136)),
    *((8, 3, 64, 400), (8, 16, 20, 48)),
]
Section = torch.Tensor | np.ndarray | int | None


@pytest.fixture(scope="module", params=["forward", "backward"])
def emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    directory, backward = shared_directory(tmp_path_factory), request.param == "backward"
    return Emulator(directory, backward=backward, sanitize="SIMT_SANITIZE" in os.environ)


def normal(rows: int, cols: int, dtype: str = "BF16", seed: int = 0) -> np.ndarray:
    """Words as of a trained matrix."""
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.03
    return bits(values.to(DTYPES[dtype][0]))


def bits(values: torch.Tensor) -> np.ndarray:
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def floats(words: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int16)).view(DTYPES[dtype][0])


def everything() -> np.ndarray:
    """All words, each once, in no order."""
    return np.random.default_rng(0).permutation(65536).astype(np.uint16).reshape(256, 256)


def skewed() -> np.ndarray:
    """Counts of Fibonacci: codes as long as they may be, and 15 ranks that are not enough."""
    counts = [1, 1]
    while len(counts) < 18:
        counts.append(counts[-1] + counts[-2])
    high = np.repeat(np.arange(18) * 7, counts)[-6600:]
    words = high * 256 + np.arange(high.size) % 256
    return np.random.default_rng(1).permutation(words).astype(np.uint16).reshape(66, 100)


AWKWARD = {
    "all words": everything(),
    "skewed": skewed(),
    "one word": np.full((40, 130), 0x7FC1, np.uint16),
    "zeros": np.zeros((33, 16), np.uint16),
    "two symbols": np.tile(np.array([0x3F80, 0xBF01], np.uint16), (5, 70)),
    "1 x 1": normal(1, 1),
    "1 x 129": normal(1, 129),
    "33 x 17": normal(33, 17, "F16"),
    "31 x 128": normal(31, 128),
    "32 x 127": normal(32, 127),
    "64 x 256": normal(64, 256),
    "40 x 264": normal(40, 264, "F16"),
    "100 x 300": normal(100, 300),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=AWKWARD)
def words(request: pytest.FixtureRequest) -> np.ndarray:
    return AWKWARD[request.param]


def packed(words: np.ndarray, layout: str, dtype: str = "BF16") -> tuple[torch.Tensor, Layout]:
    """In memory of its own, aligned as a tensor's."""
    blob = pack(words, dtype, layout)
    return torch.from_numpy(blob).clone(), parse(blob[:128].tobytes())


def sections(blob: torch.Tensor, of: Layout) -> list[Section]:
    at = (of.low, of.codes, of.index, of.table, of.extra)
    return [blob, *(offset // 16 for offset in at), of.rows, of.cols]


def output(n: int) -> torch.Tensor:
    """Room for ``n`` words and some that nobody may write."""
    return torch.full((n + 64,), CANARY, dtype=torch.int16)


def written(out: torch.Tensor, n: int) -> np.ndarray:
    assert (out[n:] == CANARY).all(), "words beyond the output were written"
    return out[:n].numpy().view(np.uint16)


def unpacked(emulator: Emulator, blob: torch.Tensor, of: Layout, first: int, n: int) -> np.ndarray:
    out = output(n * of.cols)
    blocks = -(-(-(-n // 32) * of.col_tiles) // 4)
    emulator.launch(f"unpack_{of.layout}", blocks, 128, [*sections(blob, of), first // 32, n, out])
    return written(out, n * of.cols).reshape(n, of.cols)


def test_unpack_gives_the_words(emulator: Emulator, layout: str, words: np.ndarray) -> None:
    blob, of = packed(words, layout)
    assert np.array_equal(unpacked(emulator, blob, of, 0, of.rows), words)


@pytest.mark.parametrize(("first", "n"), [(0, 1), (0, 33), (32, 32), (32, 45), (64, 36), (96, 4)])
def test_unpack_gives_the_rows_asked_for(
    emulator: Emulator, layout: str, first: int, n: int
) -> None:
    escaping = everything().ravel()[:12000].reshape(40, 300)
    words = np.concatenate([AWKWARD["100 x 300"][:60], escaping])
    blob, of = packed(words, layout)
    assert np.array_equal(unpacked(emulator, blob, of, first, n), words[first : first + n])


def test_rows_gives_each_row_asked_for(emulator: Emulator, layout: str, words: np.ndarray) -> None:
    blob, of = packed(words, layout)
    ids = np.random.default_rng(2).integers(0, of.rows, 11)
    ids[:2] = of.rows - 1, 0
    out = output(ids.size * of.cols)
    blocks = -(-ids.size * of.col_tiles // 128)
    args = [*sections(blob, of), ids, ids.size, out]
    emulator.launch(f"rows_{layout}", blocks, 128, args)
    assert np.array_equal(written(out, ids.size * of.cols).reshape(-1, of.cols), words[ids])


def packed_by_kernels(
    emulator: Emulator, words: np.ndarray, layout: str, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The whole blob, and the counts it began with."""
    rows, cols = words.shape
    matrix = [torch.from_numpy(words.view(np.int16)).clone(), rows, cols]
    counts = np.zeros(256, np.int64)
    emulator.launch("pack_histogram", 3, 256, [*matrix, int(layout == "dense"), counts])
    made = tables(counts, layout)
    tiles = -(-rows // 32) * -(-cols // 128)
    blocks, sizes = -(-tiles // 4), np.full(tiles + 1, 0xCCCCCCCC, np.uint32)
    lengths = np.full(32 * tiles if layout == "dense" else 0, 0xCC, np.uint8)
    given = [*matrix, made.code] + ([lengths] if layout == "dense" else [])
    emulator.launch(f"pack_measure_{layout}", blocks, 128, [*given, sizes])
    assert sizes[-1] == 0xCCCCCCCC
    index = np.concatenate([[0], np.cumsum(sizes[:-1], dtype=np.int64)])
    of = plan(layout, dtype, rows, cols, int(index[-1]))
    blob = torch.zeros(of.nbytes, dtype=torch.uint8)
    bytes_of = blob.numpy()
    bytes_of[of.table : of.table + made.table.size] = made.table
    of.index_of(bytes_of)[:] = index
    if layout == "dense":
        bytes_of[of.extra : of.extra + lengths.size] = lengths
    given = [*sections(blob, of), matrix[0], made.code]
    emulator.launch(f"pack_write_{layout}", blocks, 128, given)
    seal(bytes_of, of)
    return bytes_of, counts


def test_pack_gives_the_bytes_of_the_cpu(
    emulator: Emulator, layout: str, words: np.ndarray
) -> None:
    blob, counts = packed_by_kernels(emulator, words, layout, "F16")
    turned = words if layout == "fast" else words << 1 | words >> 15
    assert np.array_equal(counts, np.bincount((turned >> 8).ravel(), minlength=256))
    assert np.array_equal(blob, pack(words, "F16", layout))


def product(
    emulator: Emulator,
    words: np.ndarray,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    layout: str,
    dtype: str,
    warps: int,
    rows: tuple[int, int] | None = None,
) -> torch.Tensor:
    blob, of = packed(words, layout, dtype)
    (first, n), batch = rows or (0, of.rows), x.shape[0]
    suffix = 1 << (batch - 1).bit_length()
    y = output(batch * n)
    args: Sequence[Section] = [*sections(blob, of), first // 32, n, x, bias, y, batch]
    name = f"linear_{layout}_{DTYPES[dtype][1]}_{suffix}"
    emulator.launch(name, -(-n // 32), 32 * warps, args)
    return floats(written(y, batch * n).reshape(batch, n), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "warps", "rows", "cols"), PRODUCTS)
def test_products_of_integers_are_exact(
    emulator: Emulator, layout: str, dtype: str, batch: int, warps: int, rows: int, cols: int
) -> None:
    """Powers of two, more of them than the fast layout has ranks, whose sums are exact in fp32."""
    chance = np.random.default_rng(batch)
    power = np.minimum(chance.geometric(0.25, (rows, cols)), 13) - 6.0
    weights = torch.from_numpy(np.exp2(power) * chance.choice([-1, 1, 1, 0], power.shape))
    x = torch.from_numpy(chance.integers(-3, 4, (batch, cols))).double()
    bias = torch.from_numpy(chance.integers(-9, 10, rows)).double() if batch % 2 else None
    reach = x.abs() @ weights.abs().T + 9
    assert reach.max() < 2.0 ** (24 - 5), "sums may not be exact"
    exact = x @ weights.T + (0 if bias is None else bias)
    kind = DTYPES[dtype][0]
    given = None if bias is None else bias.to(kind)
    y = product(emulator, bits(weights.to(kind)), x.to(kind), given, layout, dtype, warps)
    assert torch.equal(y.view(torch.int16), (exact.float().to(kind) + 0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "warps"), [(1, 32), (2, 16), (6, 1)])
def test_products_stay_within_the_bound_of_fp32(
    emulator: Emulator, layout: str, dtype: str, batch: int, warps: int
) -> None:
    """Higham's bound: n u / (1 - n u) of the sum of magnitudes, and one rounding at the end."""
    rows, cols = 45, 390
    kind, _, last = DTYPES[dtype]
    chance = torch.Generator().manual_seed(batch)
    weights = (torch.randn(rows, cols, generator=chance) * 0.03).to(kind)
    weights[::7, ::11] *= 2.0**9  # ranks run out
    x = torch.randn(batch, cols, generator=chance).to(kind)
    bias = torch.randn(rows, generator=chance).to(kind)
    y = product(emulator, bits(weights), x, bias, layout, dtype, warps).double()
    exact = x.double() @ weights.double().T + bias.double()
    reach = x.double().abs() @ weights.double().abs().T + bias.double().abs()
    n = (cols + warps + 1) * 2.0**-24
    sums = n / (1 - n) * reach
    assert ((y - exact).abs() <= sums + last * (exact.abs() + sums)).all()


def test_a_product_of_some_rows(emulator: Emulator, layout: str) -> None:
    weights = torch.arange(100 * 140).reshape(100, 140) % 17 - 8.0
    x, bias = torch.ones(2, 140), torch.arange(45.0)
    kind, given = torch.bfloat16, (bits(weights.bfloat16()), x.bfloat16(), bias.bfloat16())
    y = product(emulator, *given, layout, "BF16", 2, (32, 45))
    assert torch.equal(y, (x @ weights[32:77].T + bias).to(kind))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_spreads_as_it_should(
    emulator: Emulator, layout: str, dtype: str
) -> None:
    kind = DTYPES[dtype][0]
    weights = torch.ones(6, 40, dtype=kind)
    weights[0, 3], weights[1, 5], weights[2, 39] = torch.inf, -torch.inf, torch.nan
    weights[3, 0], weights[3, 1] = torch.inf, -torch.inf
    weights[4] = torch.finfo(kind).max
    weights[5] = torch.finfo(kind).smallest_normal / 4
    x = torch.ones(1, 40, dtype=kind)
    y = product(emulator, bits(weights), x, None, layout, dtype, 1)
    expected = (x.float() @ weights.float().T).to(kind)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~expected.isnan()])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads by LD_PRELOAD")
def test_no_kernel_leaves_its_buffers(tmp_path: Path) -> None:
    """All of the above once more, under AddressSanitizer."""
    if (library := preload()) is None:
        pytest.skip("the C++ compiler has no AddressSanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "ASAN_OPTIONS": "detect_leaks=0",
        "SIMT_SANITIZE": "1",
    }
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "-m", "not slow", f"--basetemp={tmp_path / 'base'}", __file__],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
