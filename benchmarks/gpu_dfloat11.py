"""A weight in DFloat11's format (arXiv 2504.11651), for a comparison with its kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from compress.codec import code_lengths

THREADS = 512
_WINDOW = 64  # bits of a thread
_LONGEST = 32


@dataclass(frozen=True)
class Unit:
    """``parts``: luts, exponents' codes, signs and mantissas, positions, gaps, all uint8, in the
    order of the kernel's arguments; then the numbers of its launch."""

    parts: list[torch.Tensor]
    luts: int
    code_bytes: int
    blocks: int
    shared: int


def encode(weight: torch.Tensor) -> Unit:
    """Of a bf16 tensor of the CPU whose exponents are below 240. Raises `ValueError` for others."""
    words = weight.contiguous().view(torch.int16).numpy().view(np.uint16).ravel()
    exponents = (words >> 7 & 255).astype(np.uint8)
    if exponents.max() >= 240:
        raise ValueError("DFloat11 knows no exponents from 240 on")
    lengths = np.array(code_lengths(np.bincount(exponents, minlength=256).tolist(), _LONGEST))
    codes = _canonical(lengths)
    bits = lengths[exponents]
    ends = np.cumsum(bits)
    starts = ends - bits
    stream = np.zeros(-(-int(ends[-1]) // 8) * 8, np.uint8)
    for place in range(int(bits.max())):
        long = bits > place
        symbols = exponents[long]
        stream[starts[long] + place] = codes[symbols] >> (lengths[symbols] - 1 - place) & 1
    coded = np.packbits(stream)
    blocks = -(-coded.size // (THREADS * _WINDOW // 8))
    firsts = np.searchsorted(starts, np.arange(blocks * THREADS) * _WINDOW)
    inside = firsts < words.size
    gaps = np.zeros(blocks * THREADS, np.int64)
    gaps[inside] = starts[firsts[inside]] - np.flatnonzero(inside) * _WINDOW
    positions = np.append(firsts[::THREADS], words.size).astype(np.uint32)
    luts = _luts(lengths, codes)
    signs = (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
    packed_gaps = np.packbits(gaps[:, None] >> np.arange(4, -1, -1) & 1)
    arrays = (luts, coded, signs, positions.view(np.uint8), packed_gaps)
    parts = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    shared = THREADS * 4 + 4 + 2 * int(np.diff(positions.astype(np.int64)).max())
    return Unit(parts, len(luts), coded.size, blocks, shared)


def _canonical(lengths: np.ndarray) -> np.ndarray:
    """int64[256]: shorter codes are smaller, and of one length in the symbols' order."""
    codes, code, before = np.zeros(256, np.int64), 0, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda symbol: (lengths[symbol], symbol)):
        code <<= int(lengths[symbol]) - before
        codes[symbol], before = code, int(lengths[symbol])
        code += 1
    return codes


def _luts(lengths: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """uint8 (rows + 1, 256). A row for each run of whole bytes that a longer code begins with."""
    rows = {(0, 0): 0}
    used = sorted(np.flatnonzero(lengths), key=lambda symbol: lengths[symbol])
    for symbol in used:
        length, code = int(lengths[symbol]), int(codes[symbol])
        for whole in range(8, length, 8):
            rows.setdefault((whole, code >> (length - whole)), len(rows))
    luts = np.zeros((len(rows) + 1, 256), np.uint8)
    for symbol in used:
        length, code = int(lengths[symbol]), int(codes[symbol])
        row = 0
        for whole in range(8, length, 8):
            prefix = code >> (length - whole)
            next_row = rows[whole, prefix]
            luts[row, prefix & 255] = 256 - next_row
            row = next_row
        rest = (length - 1) % 8 + 1
        first = (code & ((1 << rest) - 1)) << (8 - rest)
        luts[row, first : first + (1 << (8 - rest))] = symbol
    luts[-1] = lengths
    return luts
