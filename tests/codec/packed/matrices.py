"""Matrices of 16-bit words that are awkward to pack, by name."""

from __future__ import annotations

import numpy as np

SIZES = [(1, 1), (1, 129), (33, 17), (31, 128), (32, 127), (64, 256), (100, 300)]


def trained(shape: tuple[int, int], dtype: str = "BF16", seed: int = 0) -> np.ndarray:
    """Words as trained weights have them."""
    values = np.random.default_rng(seed).normal(scale=0.02, size=shape)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def of_counts(counts: list[int], layout: str, cols: int, seed: int = 0) -> np.ndarray:
    """Words whose coded bytes occur so often; the first of them fills the last row up."""
    random = np.random.default_rng(seed)
    high = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    high = random.permutation(np.concatenate((high, np.zeros(-len(high) % cols, np.uint16))))
    words = high << 8 | random.integers(0, 256, high.size, dtype=np.uint16)
    if layout == "dense":
        words = words >> 1 | words << 15
    return words.reshape(-1, cols)


def fibonacci(n: int) -> list[int]:
    """Counts whose unlimited Huffman codes have up to ``n - 1`` bits."""
    counts = [1, 1]
    while len(counts) < n:
        counts.append(counts[-1] + counts[-2])
    return counts[::-1]


def degenerate(layout: str) -> dict[str, np.ndarray]:
    return {
        "one word": np.full((33, 130), 0xBEEF, np.uint16),
        "one symbol": of_counts([4000], layout, 100),
        "two symbols": of_counts([4000, 1], layout, 127),
        "fifteen symbols": of_counts([50] * 15, layout, 50),
        "sixteen symbols": of_counts([50] * 16, layout, 50),
        "all symbols alike": of_counts([20] * 256, layout, 160),
        "Fibonacci": of_counts(fibonacci(20), layout, 128),
    }


_BITS = "0000 8000 0001 8001 007F 03FF 7F80 FF80 7C00 FC00 7F81 FFC1 7FFF FFFF 7C01 7E01 3F80 3C00"
SPECIAL = np.array([int(word, 16) for word in _BITS.split()], np.uint16)
"""Zeros, denormals, infinities, NaN with payloads, and ones, of both dtypes."""
