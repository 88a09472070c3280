"""CRC-32C of many rows of bytes at once, in numpy.

The remainder is linear over GF(2), so neighbouring pieces can be joined pairwise as a tree: the
left one is advanced past the right one's length, which is two lookups in tables of 16-bit halves.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from compress.codec.checksum import byte_table


@cache
def _advance_tables(log2_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables, for the low and the high half, that advance a remainder past 2**k zero bytes."""
    if log2_bytes == 0:
        step = np.array(byte_table(), np.uint32)
        half = np.arange(1 << 16, dtype=np.uint32)
        low = step[half & 255] ^ half >> 8
        high = half << 16 >> 8
        return low, high
    low, high = _advance_tables(log2_bytes - 1)
    return _advance(low, log2_bytes - 1), _advance(high, log2_bytes - 1)


def _advance(remainders: np.ndarray, log2_bytes: int) -> np.ndarray:
    low, high = _advance_tables(log2_bytes)
    advanced: np.ndarray = low[remainders & 0xFFFF] ^ high[remainders >> 16]
    return advanced


def crc32c_rows(rows: np.ndarray) -> np.ndarray:
    """CRC-32C of each row of a C-contiguous uint8 matrix, as uint32."""
    count, nbytes = rows.shape
    # Zeros in front of a message leave its remainder alone; the initial value is put in at the end.
    padding = -nbytes % 4
    if padding:
        rows = np.concatenate([np.zeros((count, padding), np.uint8), rows], axis=1)
    words = rows.view("<u4")
    if words.shape[1] == 0:
        words = np.zeros((count, 1), np.uint32)
    log2_bytes = 2
    while words.shape[1] > 1:
        if words.shape[1] % 2:
            words = np.concatenate([np.zeros((count, 1), np.uint32), words], axis=1)
        words = _advance(words[:, ::2], log2_bytes) ^ words[:, 1::2]
        log2_bytes += 1
    initial = np.array([0xFFFFFFFF], np.uint32)
    for bit in range(nbytes.bit_length()):
        if nbytes >> bit & 1:
            initial = _advance(initial, bit)
    return _advance(words[:, 0], 2) ^ initial ^ np.uint32(0xFFFFFFFF)
