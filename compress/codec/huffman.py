"""The canonical encoder's decisions (docs/FORMAT.md): segmentation, plane modes, code lengths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter

from compress.codec.format import GROUP_BLOCKS, MAX_CODE_BITS, STREAMS
from compress.codec.segment import CONSTANT, HUFFMAN, RAW, Plane

Counts = Sequence[int]
"""How often each of the 256 symbols occurs."""


@lru_cache(1 << 16)
def log2_fixed(x: int) -> int:
    """``256 * log2(x)`` for ``x >= 1``, floored, in integers alone (rule 3)."""
    k = x.bit_length() - 1
    y, result = (x << 16) >> k, k
    for _ in range(8):
        y = y * y >> 16
        result *= 2
        if y >= 1 << 17:
            y >>= 1
            result += 1
    return result


def code_lengths(counts: Counts, limit: int = MAX_CODE_BITS) -> tuple[int, ...]:
    """Optimal code lengths of at most ``limit`` bits for two or more symbols (rule 5).

    Package-merge: Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman
    codes", JACM 37(3), 1990. Leaves are taken in sorted order on every level, so that the number
    of leaves taken says which ones.
    """
    symbols = sorted((s for s in range(256) if counts[s]), key=lambda s: (counts[s], s))
    leaves = [(counts[s], True) for s in symbols]
    levels: list[list[tuple[int, bool]]] = []
    pairs: list[tuple[int, bool]] = []
    for _ in range(limit):
        # The sort is stable: at equal weight a leaf stays ahead of a pair.
        items = sorted(leaves + pairs, key=itemgetter(0))
        levels.append(items)
        pairs = [(a + b, False) for (a, _), (b, _) in zip(items[::2], items[1::2], strict=False)]
    lengths = [0] * 256
    take = 2 * len(symbols) - 2
    for items in reversed(levels):
        taken = sum(is_leaf for _, is_leaf in items[:take])
        for symbol in symbols[:taken]:
            lengths[symbol] += 1
        take = 2 * (take - taken)
    return tuple(lengths)


def canonical_codes(lengths: Sequence[int]) -> list[int]:
    """The code of each symbol, 0 where its length is 0: consecutive by (length, symbol)."""
    codes, code, previous = [0] * 256, 0, 0
    for symbol in sorted((s for s in range(256) if lengths[s]), key=lambda s: (lengths[s], s)):
        code <<= lengths[symbol] - previous
        previous = lengths[symbol]
        codes[symbol] = code
        code += 1
    return codes


def plan_plane(counts: Counts, n_blocks: int) -> Plane:
    """The mode and table of a plane of a segment of ``n_blocks`` blocks (rule 4)."""
    words = sum(counts)
    if max(counts) == words:
        return Plane(CONSTANT, value=counts.index(words))
    lengths = code_lengths(counts)
    bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
    used = [symbol for symbol, count in enumerate(counts) if count]
    table = 3 + (used[-1] - used[0] + 2) // 2 + 2 * STREAMS * n_blocks
    pays = 64 * (-(-bits // 8) + table) <= 63 * words
    return Plane(HUFFMAN, lengths=lengths) if pays else Plane(RAW)


def add_counts(blocks: Sequence[Sequence[Counts]]) -> list[list[int]]:
    """By plane, the sum over ``blocks`` (block × plane × symbol)."""
    return [
        [sum(column) for column in zip(*plane, strict=True)] for plane in zip(*blocks, strict=True)
    ]


def segment_blocks(blocks: Sequence[Sequence[Counts]]) -> int:
    """Blocks per segment, 16, 4 or 1, for a group with these counts (rules 1 and 2)."""
    best, least = GROUP_BLOCKS, _estimate(blocks, GROUP_BLOCKS)
    for size in (4, 1):
        if len(blocks) > size:
            bits = _estimate(blocks, size)
            if 128 * bits < 127 * least:
                best, least = size, bits
    return best


def _estimate(blocks: Sequence[Sequence[Counts]], size: int) -> int:
    total = 0
    for first in range(0, len(blocks), size):
        total += 8 * 48 + sum(map(_estimate_plane, add_counts(blocks[first : first + size])))
    return total


def _estimate_plane(counts: Counts) -> int:
    words = sum(counts)
    log2_words = log2_fixed(words)
    bits = sum(count * (log2_words - log2_fixed(count)) for count in counts if count)
    return min(8 * words, 8 * 24 + (bits >> 8))
