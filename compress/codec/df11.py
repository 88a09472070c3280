"""Units of a DFloat11 checkpoint to bf16 (arXiv 2504.11651, section 2.3), checked as they go.

A unit's exponents are one stream of Huffman codes, highest bit first, cut into windows of 64 bits
and blocks of 512 windows. ``gaps`` says for each window where its first code begins, and
``output_positions`` for each block which weight it begins with, so blocks are decoded side by side.
Nothing read is trusted: what is decoded must meet every gap and position.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.codec import backends
from compress.errors import Corrupt

if TYPE_CHECKING:
    import numpy as np

WINDOW_BYTES = 8
BLOCK_WINDOWS = 512
_BLOCK_BYTES = WINDOW_BYTES * BLOCK_WINDOWS
_TAIL = 8  # bytes after the stream that the native reader may touch
_POINTER = 64  # in the place of a length: the high byte is the row that the next eight bits index
_FIRST_POINTER = 240
_BATCH_BLOCKS = 256


@dataclass(frozen=True)
class Unit:
    """The stored arrays of a unit, all uint8 but ``positions``, which is uint32.

    ``luts`` (rows + 1, 256): what the next eight bits mean; 240 and more is row 256 - value for the
    eight bits after them; the last row holds the length of each symbol's code. ``codes``: the
    stream. ``sign_mantissa`` (weights,): the sign and seven bits of mantissa of each weight.
    ``positions`` (blocks + 1,), ``gaps``: five bits a window, packed.
    """

    luts: np.ndarray
    codes: np.ndarray
    sign_mantissa: np.ndarray
    positions: np.ndarray
    gaps: np.ndarray


def decode_unit(unit: Unit, where: object) -> np.ndarray:
    """The bf16 words (uint16) of a unit. Raises `Corrupt` naming ``where``.

    The native library does it on all processors where it can be had, numpy otherwise.
    """
    import numpy as np

    table = _code_table(unit.luts, where)
    positions = _positions(unit, where)
    out = np.empty(unit.sign_mantissa.size, np.uint16)
    if backends.choose().NAME == "native":
        bad = _by_library(unit, table, positions, out, backends.threads_or_all(None))
    else:
        bad = _by_numpy(unit, table, positions, out)
    if bad is not None:
        raise Corrupt(
            f"block {bad}: codes, gaps and output_positions contradict each other", where=where
        )
    return out


def _by_library(
    unit: Unit, table: np.ndarray, positions: np.ndarray, out: np.ndarray, threads: int
) -> int | None:
    """Fill ``out``; returns the first block that contradicts itself."""
    import numpy as np

    from compress.codec import native

    library = native.library()[0]
    assert library is not None  # or the backend would be another
    codes = np.concatenate([unit.codes, np.zeros(_TAIL, np.uint8)])
    void, u64 = ctypes.c_void_p, ctypes.c_uint64
    at = (ctypes.c_int64 * 2)()
    library.ep_df11_decode.restype = ctypes.c_int64
    result = library.ep_df11_decode(
        void(table.ctypes.data),
        void(codes.ctypes.data),
        u64(unit.codes.size),
        void(unit.sign_mantissa.ctypes.data),
        void(positions.ctypes.data),
        void(unit.gaps.ctypes.data),
        u64(out.size),
        void(out.ctypes.data),
        threads,
        at,
    )
    return int(at[1]) if result else None


def _code_table(luts: np.ndarray, where: object) -> np.ndarray:
    """``luts`` as (rows, 256) uint16: symbol and code length, or row and `_POINTER`, or 0.

    Every symbol with a length has exactly one code, of that length, and every row is reached once.
    What is left over are the codes that the encoder gave to no exponent; its tables repeat there
    whatever stood before them, and no valid stream holds them.
    """
    import numpy as np

    if luts.ndim != 2 or luts.shape[1] != 256 or not 2 <= len(luts) <= 18:
        raise Corrupt("the code tables have an impossible shape", where=where, got=luts.shape)
    rows, lengths = luts[:-1].astype(int), luts[-1].astype(int)
    table = np.zeros(rows.shape, np.uint16)
    depth = [0] + [-1] * (len(rows) - 1)
    missing = set(np.flatnonzero(lengths).tolist())
    for index, row in enumerate(rows):
        for value in dict.fromkeys(row.tolist()):  # in the order they appear
            first = int(np.argmax(row == value))
            pointed = 256 - value
            if value >= _FIRST_POINTER:
                if pointed < len(rows) and depth[pointed] < 0 <= depth[index] < 3:
                    depth[pointed] = depth[index] + 1
                    table[index, first] = pointed << 8 | _POINTER
                continue
            length = lengths[value] - 8 * depth[index]
            if value in missing and depth[index] >= 0 and 1 <= length <= 8:
                width = 1 << 8 - length
                if first % width == 0 and (row[first : first + width] == value).all():
                    table[index, first : first + width] = value << 8 | lengths[value]
                    missing.remove(value)
    if missing or min(depth) < 0:
        wrong = f"symbols {sorted(missing)[:4]}" if missing else "a row that nothing points to"
        raise Corrupt("the code tables are no prefix code", where=where, got=wrong)
    return table


def _positions(unit: Unit, where: object) -> np.ndarray:
    """``output_positions`` (blocks + 1,), once all sizes and its order have been checked."""
    import numpy as np

    words, positions = unit.sign_mantissa.size, unit.positions
    blocks = -(-unit.codes.size // _BLOCK_BYTES)
    if not words or not blocks:
        raise Corrupt("the unit holds no weights", where=where)
    if unit.gaps.size != blocks * BLOCK_WINDOWS * 5 // 8:
        raise Corrupt(
            "gaps disagree with the length of encoded_exponent",
            where=where,
            got=f"{unit.gaps.size} bytes",
            expected=blocks * BLOCK_WINDOWS * 5 // 8,
        )
    if positions.size == blocks and positions[-1] == words:
        positions = np.append(positions, positions[-1])  # the encoder forgets a block without codes
    ordered = positions.size == blocks + 1 and bool((positions[1:] >= positions[:-1]).all())
    if not ordered or positions[0] or positions[-1] != words:
        raise Corrupt("output_positions do not count up to the number of weights", where=where)
    return np.ascontiguousarray(positions)


def _by_numpy(unit: Unit, table: np.ndarray, positions: np.ndarray, out: np.ndarray) -> int | None:
    """As `_by_library`: all windows of some blocks at once, one code of each at a time."""
    import numpy as np

    blocks = positions.size - 1
    padded = np.zeros(blocks * _BLOCK_BYTES + WINDOW_BYTES, np.uint8)
    padded[: unit.codes.size] = unit.codes
    high = padded.view(">u8").astype(np.uint64)
    words = out.size
    for first in range(0, blocks, _BATCH_BLOCKS):
        last = min(first + _BATCH_BLOCKS, blocks)
        windows = slice(first * BLOCK_WINDOWS, last * BLOCK_WINDOWS)
        gaps, following = _gaps(unit, first, last)
        low = high[windows.start + 1 : windows.stop + 1]
        symbols, lengths = _decode_windows(table, high[windows], low, gaps)
        counts = (lengths > 0).sum(axis=0).reshape(-1, BLOCK_WINDOWS)
        starts = np.cumsum(counts, axis=1) - counts + positions[first:last, None]
        # What follows the last weight is padding, and decodes to anything.
        counts = np.clip(words - starts, 0, counts)
        inside = np.arange(len(symbols))[:, None] < counts.ravel()
        ends = gaps + np.where(inside, lengths, 0).sum(axis=0)
        goes_on = (starts + counts).ravel() < words
        expected = following + 8 * WINDOW_BYTES
        left = 8 * unit.codes.size - 8 * WINDOW_BYTES * np.arange(windows.start, windows.stop)
        bad = np.where(goes_on, ends != expected, (counts.ravel() > 0) & (ends > left))
        wrong = bad.reshape(-1, BLOCK_WINDOWS).any(axis=1)
        wrong |= counts.sum(axis=1) != np.diff(positions[first : last + 1].astype(np.int64))
        if wrong.any():
            return first + int(np.argmax(wrong))
        these = slice(int(positions[first]), int(positions[last]))
        other = unit.sign_mantissa[these].astype(np.uint16)
        exponents = symbols.T[inside.T].astype(np.uint16)
        out[these] = (other & 0x80) << 8 | exponents << 7 | other & 0x7F
    return None


def _gaps(unit: Unit, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The gaps of the windows of some blocks, and those of the windows after each."""
    import numpy as np

    each = BLOCK_WINDOWS * 5 // 8
    packed = np.append(unit.gaps[first * each : (last + 1) * each], np.zeros(each, np.uint8))
    gaps = np.unpackbits(packed).reshape(-1, 5) @ np.array([16, 8, 4, 2, 1])
    count = (last - first) * BLOCK_WINDOWS
    return gaps[:count], gaps[1 : count + 1]


def _decode_windows(
    table: np.ndarray, high: np.ndarray, low: np.ndarray, gaps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and lengths (steps, windows) of the codes that begin in each window; 0: no more.

    ``high``, ``low``: the 64 bits of each window and of the one after it.
    """
    import numpy as np

    at = gaps.astype(np.uint64)
    steps = 8 * WINDOW_BYTES
    symbols, lengths = np.zeros((2, steps, at.size), np.uint8)
    lanes = np.arange(at.size)
    for step in range(steps):
        offset = at[lanes]
        # numpy shifts 64 bits out by 64, which C does not promise.
        spill = low[lanes] >> np.uint64(32) >> np.uint64(1) >> (np.uint64(63) - offset)
        bits = (high[lanes] << offset) >> np.uint64(32) | spill
        entry = table[0, (bits >> np.uint64(24)).astype(np.intp)]
        for shift in (16, 8, 0):
            pointers = np.flatnonzero(entry & 0xFF == _POINTER)
            if not pointers.size:
                break
            byte = (bits[pointers] >> np.uint64(shift) & np.uint64(0xFF)).astype(np.intp)
            entry[pointers] = table[entry[pointers] >> 8, byte]
        symbols[step, lanes], lengths[step, lanes] = entry >> 8, entry & 0xFF
        at[lanes] += entry & 0xFF
        lanes = lanes[(entry & 0xFF > 0) & (at[lanes] < steps)]
        if not lanes.size:
            return symbols[: step + 1], lengths[: step + 1]
    return symbols, lengths
