"""The tables of a packed weight: made from counts, and told sound or not (docs/PACKED.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.codec.huffman import canonical_codes, code_lengths

if TYPE_CHECKING:
    import numpy as np

WINDOW = 12  # bits of the longest code
ESCAPE = 15  # the rank that names no high byte


@dataclass(frozen=True)
class Tables:
    """What decoding and coding need to know of a matrix.

    ``table``: uint8, the blob's section. ``code``: fast: uint8[256], the rank of each high byte, 15
    where it has none; dense: uint32[256], ``length << 16 | code``, the code's first bit lowest.
    """

    table: np.ndarray
    code: np.ndarray


def tables(histogram: Sequence[int] | np.ndarray, layout: str) -> Tables:
    """The tables for 256 counts of high bytes, ``dense``: of the words rotated left by one."""
    counts = [int(count) for count in histogram]
    if layout == "fast":
        return _rank_tables(counts)
    most = max(range(256), key=counts.__getitem__)
    return code_tables(code_lengths(counts, WINDOW), most)


def _rank_tables(counts: Sequence[int]) -> Tables:
    import numpy as np

    by_count = sorted((s for s in range(256) if counts[s]), key=lambda s: (-counts[s], s))
    used = by_count[:ESCAPE]
    table = np.zeros(16, np.uint8)
    table[: len(used)] = used
    rank = np.full(256, ESCAPE, np.uint8)
    rank[used] = np.arange(len(used), dtype=np.uint8)
    return Tables(table, rank)


def code_tables(lengths: Sequence[int], only: int) -> Tables:
    """The tables for 256 code lengths; ``only``: the symbol that there is if all of them are 0."""
    import numpy as np

    entries = np.zeros(1 << WINDOW, "<u2")
    code = np.zeros(256, np.uint32)
    if not any(lengths):
        entries[:] = only << 8
    for symbol, bits in enumerate(canonical_codes(lengths)):
        if length := lengths[symbol]:
            first_bit_lowest = int(f"{bits:0{length}b}"[::-1], 2)
            entries[first_bit_lowest :: 1 << length] = symbol << 8 | length
            code[symbol] = length << 16 | first_bit_lowest
    return Tables(entries.view(np.uint8), code)
