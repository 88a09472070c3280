"""What of a packed weight can be proven sound without decoding: table, index and padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.codec.packed.layout import ALIGN, GROUP_COLS, TILE_ROWS, Layout, plan
from compress.codec.packed.tables import ESCAPE, WINDOW, code_tables
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    import numpy as np


def check_sections(blob: np.ndarray, layout: Layout, where: str | None = None) -> None:
    """`Corrupt` unless table, index and padding of ``blob`` (uint8) are what packing gives."""
    table = blob[layout.table : layout.table + layout.table_nbytes]
    table_fits = _ranks_fit if layout.layout == "fast" else _codes_fit
    for sound, what in (
        (table_fits(table), "table is not valid"),
        (_index_fits(blob, layout), "index is not valid"),
        (_padding_is_zero(blob, layout), "padding is not zero"),
    ):
        if not sound:
            raise Corrupt(f"the packed weight's {what}", where=where)


def _ranks_fit(table: np.ndarray) -> bool:
    """High bytes that differ, then zeros."""
    import numpy as np

    used = np.trim_zeros(table[:ESCAPE], "b")
    return not table[ESCAPE] and np.unique(used).size == used.size


def _codes_fit(table: np.ndarray) -> bool:
    """The canonical code of the lengths that the entries name, and a complete one."""
    import numpy as np

    symbols, bits = (table.view("<u2") >> 8).astype(int), table.view("<u2") & 255
    if bits.max() > WINDOW:
        return False
    lengths = np.zeros(256, int)
    lengths[symbols] = bits
    filled = (1 << WINDOW >> lengths[lengths > 0]).sum()
    if filled not in (0, 1 << WINDOW):
        return False
    return np.array_equal(code_tables(lengths.tolist(), int(symbols[0])).table, table)


def _index_fits(blob: np.ndarray, layout: Layout) -> bool:
    """The index rises from 0 to what the blob has room for."""
    import numpy as np

    index = layout.index_of(blob).astype(np.int64)
    if index[0] or (np.diff(index) < 0).any():
        return False
    try:
        told = plan(layout.layout, layout.dtype, layout.rows, layout.cols, int(index[-1]))
    except BadInput:
        return False
    return told == layout


def _padding_is_zero(blob: np.ndarray, layout: Layout) -> bool:
    """No byte or rank that belongs to no weight, or lies between sections, is anything else."""
    end_of_index = layout.index + 4 * (layout.tiles + 1)
    last = int(layout.index_of(blob)[-1])
    gaps = [blob[end_of_index : -(-end_of_index // ALIGN) * ALIGN]]
    cols = layout.cols % GROUP_COLS or GROUP_COLS
    low = _plane(blob, layout, layout.low, 16)
    gaps += [low[:, -1, :, cols:], _below(low, layout)]
    if layout.layout == "fast":
        ranks = _plane(blob, layout, layout.codes, 8)
        gaps += [ranks[:, -1, :, (cols + 1) // 2 :], _below(ranks, layout)]
        gaps += [ranks[:, -1, :, cols // 2 : (cols + 1) // 2] >> 4]
        gaps += [blob[layout.extra + 4 * last :]]
    else:
        gaps += [blob[layout.codes + ALIGN * last :]]
    return not any(gap.any() for gap in gaps)


def _plane(blob: np.ndarray, layout: Layout, offset: int, width: int) -> np.ndarray:
    """Low bytes or ranks as (row tile, group, row, byte)."""
    shape = (layout.row_tiles, layout.groups, TILE_ROWS, width)
    return blob[offset : offset + layout.row_tiles * layout.groups * TILE_ROWS * width].reshape(
        shape
    )


def _below(plane: np.ndarray, layout: Layout) -> np.ndarray:
    """The rows beyond the matrix."""
    return plane[-1, :, layout.rows % TILE_ROWS or TILE_ROWS :]
