"""Does a device do with packed weights what the CPU does, bit for bit? For `doctor` and tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.codec.packed import cuda
from compress.codec.packed.api import pack
from compress.codec.packed.layout import DTYPES, HEADER, LAYOUTS, TILE_ROWS, parse
from compress.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

_SHAPES = (
    *((1, 1), (1, 129), (33, 17), (31, 128), (32, 127), (64, 256), (100, 300), (1, 4096)),
    *((515, 1), (40, 264), (257, 1025)),
)
_BATCHES = (1, 2, 3, 8)


@dataclass
class SelfTest:
    """How many comparisons were made, and of those that failed a line each."""

    comparisons: int = 0
    faults: list[str] = field(default_factory=list)


def self_test(
    device: torch.device,
    matrices: Mapping[str, np.ndarray] | None = None,
    *,
    progress: Progress = SILENT,
) -> SelfTest:
    """Unpack, look up, pack and multiply on ``device``; compare bits with what the CPU says.

    ``matrices``: uint16 (rows, cols) by name, `awkward` if None, each taken in both layouts and as
    both dtypes. Raises as `cuda.launcher` where the device cannot be used at all.
    """
    cuda.launcher(device)
    matrices = awkward() if matrices is None else matrices
    found = SelfTest()
    kinds = [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES]
    with progress.step("self-test", len(kinds) * (len(matrices) + 1), "case") as step:
        for layout, dtype in kinds:
            for name, words in matrices.items():
                for what, same in _exactness(words, dtype, layout, device):
                    _note(found, same, f"{what} {name} ({layout}, {dtype})")
                step.advance(1)
            for what, same in _products(dtype, layout, device):
                _note(found, same, f"{what} ({layout}, {dtype})")
            step.advance(1)
    return found


def awkward() -> dict[str, np.ndarray]:
    """Some thirty matrices of 16-bit words that a coder may stumble over, the same each time."""
    import numpy as np

    random = np.random.default_rng(0)

    def bf16(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)

    def drawn(*words: int) -> np.ndarray:
        return random.choice(np.array(words, np.uint16), (70, 200))

    def high_bytes(counts: list[int]) -> np.ndarray:
        high = random.permutation(np.repeat(np.arange(len(counts)) * 11 % 256, counts))
        return (high << 8 | random.integers(0, 256, high.size)).astype(np.uint16)[None]

    fibonacci = [1, 1]
    while len(fibonacci) < 18:
        fibonacci.append(sum(fibonacci[-2:]))
    normal = random.standard_normal((96, 384))
    spike = np.zeros((65, 257), np.uint16)
    spike[-1, -1] = 0xFFFF
    grown = bf16(normal * 2.0 ** np.linspace(-60, 60, 384))
    return {
        "all words": np.arange(65536, dtype=np.uint16).reshape(256, 256),
        "all words shuffled": random.permutation(65536).astype(np.uint16).reshape(128, 512),
        "noise": random.integers(0, 65536, (96, 384), np.uint16),
        "zeros": np.zeros((33, 130), np.uint16),
        "one NaN": np.full((40, 130), 0x7FC1, np.uint16),
        "one word and another at the end": spike,
        "signed zeros": drawn(0x0000, 0x8000),
        "signalling NaNs and infinities": drawn(0x7F81, 0xFFFF, 0x7F80, 0xFF80, 0x7C01, 0xFC00),
        "denormals": random.integers(0, 128, (70, 200), np.uint16) | drawn(0, 0x8000),
        "15 high bytes": high_bytes([600] * 15),
        "16 high bytes": high_bytes([600] * 16),
        "256 high bytes": high_bytes([40] * 256),
        "Fibonacci's counts": high_bytes(fibonacci),
        "normal": bf16(normal * 0.02),
        "large normal": bf16(normal * 1e30),
        "Cauchy": bf16(random.standard_cauchy((96, 384))),
        "columns of every size": grown,
        "rows of every size": np.ascontiguousarray(grown.T),
        "sixteen values": bf16(np.round(normal * 3).clip(-8, 7) / 8),
        "sparse": bf16(normal * (random.random(normal.shape) < 0.05)),
        **{f"{r} x {c}": bf16(random.standard_normal((r, c)) * 0.02) for r, c in _SHAPES},
    }


def _exactness(
    words: np.ndarray, dtype: str, layout: str, device: torch.device
) -> Iterator[tuple[str, bool]]:
    import numpy as np
    import torch

    host = pack(words, dtype, layout)
    planned = parse(host[:HEADER].tobytes())
    blob = torch.from_numpy(host).to(device)

    def same(got: torch.Tensor, expected: np.ndarray) -> bool:
        return np.array_equal(got.cpu().view(torch.int16).numpy().view(np.uint16), expected)

    yield "unpacking", same(cuda.unpack(blob, planned), words)
    last = (len(words) - 1) // TILE_ROWS * TILE_ROWS
    yield "unpacking the end of", same(cuda.unpack(blob, planned, last), words[last:])
    ids = np.arange(len(words))[::-3].copy()
    yield "rows of", same(cuda.rows(torch.from_numpy(ids).to(device), blob, planned), words[ids])
    weight = torch.from_numpy(words.view(np.int16)).view(cuda.torch_dtype(planned)).to(device)
    made, again = cuda.pack(weight, layout)
    yield "packing", again == planned and np.array_equal(made.cpu().numpy(), host)


def _products(dtype: str, layout: str, device: torch.device) -> Iterator[tuple[str, bool]]:
    """Of small integers, whose sums are exact in whatever order."""
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(0)
    torch_type = cuda.dtypes()[dtype]

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).to(torch_type)

    weight = integers(70, 333)
    words = weight.view(torch.int16).numpy().view(np.uint16)
    host = pack(words, dtype, layout)
    blob, planned = torch.from_numpy(host).to(device), parse(host[:HEADER].tobytes())
    for batch in _BATCHES:
        x, bias = integers(batch, 333), integers(70)
        sums = x.double() @ weight.double().T + bias.double()
        got = cuda.linear(x.to(device), blob, planned, bias.to(device)).cpu()
        yield f"the product with {batch} rows", torch.equal(got, sums.to(torch_type))
        part = cuda.linear(x.to(device), blob, planned, None, TILE_ROWS, 7).cpu()
        exact = (sums - bias.double())[:, TILE_ROWS : TILE_ROWS + 7]
        yield f"part of the product with {batch} rows", torch.equal(part, exact.to(torch_type))


def _note(found: SelfTest, same: bool, what: str) -> None:
    found.comparisons += 1
    if not same:
        found.faults.append(f"{what}: the device's bits differ from the CPU's")
