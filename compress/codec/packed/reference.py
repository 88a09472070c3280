"""The oracle: docs/PACKED.md in numpy, all lanes of a matrix at once, column by column.

It judges the native engine and the GPU's kernels, and works where no compiler is.
"""

from __future__ import annotations

import math

import numpy as np

from compress.codec.packed.layout import ALIGN, GROUP_COLS, TILE_COLS, TILE_ROWS, Layout
from compress.codec.packed.tables import ESCAPE, WINDOW

NAME = "reference"


def histogram(words: np.ndarray, layout: str, threads: int) -> np.ndarray:
    return np.bincount((_turned(words, layout) >> 8).ravel(), minlength=256)


def measure(
    words: np.ndarray, layout: str, code: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray | None]:
    if layout == "fast":
        escapes = _tiles(code[words >> 8] == ESCAPE)
        return _index(escapes.sum(axis=(2, 3))), None
    bits = code[_turned(words, layout) >> 8] >> 16
    lengths = (_tiles(bits).sum(axis=3, dtype=np.int64) + 7) // 8
    units = -(-lengths.sum(axis=2) // ALIGN)
    return _index(units), lengths.astype(np.uint8).ravel()


def write(
    words: np.ndarray, blob: np.ndarray, layout: Layout, code: np.ndarray, threads: int
) -> None:
    turned = _turned(words, layout.layout)
    low, high = (turned & 255).astype(np.uint8), turned >> 8
    if layout.layout == "fast":
        ranks = code[high]
        escaped = ranks == ESCAPE
        low[escaped] = 0
        padded = _groups(ranks)
        codes = (padded[..., 0::2] | padded[..., 1::2] << 4).ravel()
        blob[layout.codes : layout.codes + codes.size] = codes
        _, _, row, col = np.nonzero(_tiles(escaped))
        escapes = row << 23 | col << 16 | _tiles(words)[_tiles(escaped)]
        blob[layout.extra :][: 4 * escapes.size] = escapes.astype("<u4").view(np.uint8)
    else:
        _write_streams(blob[layout.codes :], _starts(blob, layout), _tiles(code[high]))
    plane = _groups(low).ravel()
    blob[layout.low : layout.low + plane.size] = plane


def unpack(
    blob: np.ndarray, layout: Layout, first: int, out: np.ndarray, threads: int
) -> int | None:
    first_tile = first // TILE_ROWS
    row_tiles = slice(first_tile, -(-(first + len(out)) // TILE_ROWS))
    low = _low(blob, layout)[row_tiles]
    if layout.layout == "dense":
        high, damaged = _read_streams(blob, layout, row_tiles)
        turned = _matrix(low, out.shape) | _matrix(high, out.shape) << 8
        out[:] = turned >> 1 | turned << 15
        return damaged
    high = _table(blob, layout)[_ranks(blob, layout)[row_tiles]].astype(np.uint16)
    out[:] = _matrix(low, out.shape) | _matrix(high, out.shape) << 8
    row, col, word, tile = _escapes(blob, layout)
    outside = (row >= layout.rows) | (col >= layout.cols)
    if outside.any():
        return int(tile[outside][0])
    asked = (row >= first) & (row < first + len(out))
    out[row[asked] - first, col[asked]] = word[asked]
    return None


def check(blob: np.ndarray, layout: Layout, threads: int) -> int | None:
    if layout.layout == "dense":
        return _read_streams(blob, layout, slice(0, layout.row_tiles))[1]
    shape = (layout.rows, layout.cols)
    expected = _matrix(_ranks(blob, layout), shape) == ESCAPE
    row, col, _, tile = _escapes(blob, layout)
    for t in range(layout.tiles):
        top, left = TILE_ROWS * (t // layout.col_tiles), TILE_COLS * (t % layout.col_tiles)
        rows, cols = np.nonzero(expected[top : top + TILE_ROWS, left : left + TILE_COLS])
        listed = tile == t
        if not (
            np.array_equal(row[listed], top + rows) and np.array_equal(col[listed], left + cols)
        ):
            return t
    low = _matrix(_low(blob, layout), shape)
    if wrong := np.argwhere(expected & (low != 0)).tolist():
        return int(wrong[0][0] // TILE_ROWS * layout.col_tiles + wrong[0][1] // TILE_COLS)
    return None


def _turned(words: np.ndarray, layout: str) -> np.ndarray:
    """The words as they are split into bytes."""
    return words if layout == "fast" else words << 1 | words >> 15


def _tiles(matrix: np.ndarray) -> np.ndarray:
    """A matrix as (row tile, column tile, row, column), filled up with zeros."""
    return _cut(matrix, TILE_COLS)


def _groups(matrix: np.ndarray) -> np.ndarray:
    """A matrix as (row tile, group, row, column), filled up with zeros."""
    return _cut(matrix, GROUP_COLS)


def _cut(matrix: np.ndarray, width: int) -> np.ndarray:
    rows, cols = matrix.shape
    padded = np.pad(matrix, ((0, -rows % TILE_ROWS), (0, -cols % width)))
    return padded.reshape(-1, TILE_ROWS, padded.shape[1] // width, width).transpose(0, 2, 1, 3)


def _matrix(cut: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What `_tiles` or `_groups` cut, as uint16."""
    tiles, across, rows, cols = cut.shape
    joined = cut.transpose(0, 2, 1, 3).reshape(tiles * rows, across * cols)
    return joined[: shape[0], : shape[1]].astype(np.uint16)


def _index(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts.ravel(), dtype=np.int64)))


def _table(blob: np.ndarray, layout: Layout) -> np.ndarray:
    return blob[layout.table : layout.table + layout.table_nbytes]


def _low(blob: np.ndarray, layout: Layout) -> np.ndarray:
    shape = (layout.row_tiles, layout.groups, TILE_ROWS, GROUP_COLS)
    return blob[layout.low :][: math.prod(shape)].reshape(shape)


def _ranks(blob: np.ndarray, layout: Layout) -> np.ndarray:
    shape = (layout.row_tiles, layout.groups, TILE_ROWS, GROUP_COLS // 2)
    pairs = blob[layout.codes :][: math.prod(shape)].reshape(shape)
    return np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(*shape[:3], GROUP_COLS)


def _escapes(blob: np.ndarray, layout: Layout) -> tuple[np.ndarray, ...]:
    """Row, column, word and tile of every escape; a row out of the matrix where one is damaged."""
    index = layout.index_of(blob).astype(np.int64)
    room = (layout.nbytes - ALIGN - layout.extra) // 4
    index = np.clip(np.maximum.accumulate(index), 0, room)
    listed = blob[layout.extra :][: 4 * index[-1]].view("<u4").astype(np.int64)[index[0] :]
    tile = np.repeat(np.arange(layout.tiles), np.diff(index))
    row = tile // layout.col_tiles * TILE_ROWS + (listed >> 23)
    row[listed >> 28 != 0] = layout.rows
    return row, tile % layout.col_tiles * TILE_COLS + (listed >> 16 & 127), listed & 0xFFFF, tile


def _starts(blob: np.ndarray, layout: Layout) -> np.ndarray:
    """The byte of the codes at which each stream begins: (row tile, column tile, lane)."""
    lengths = _lengths(blob, layout)
    tile = layout.index_of(blob)[:-1].reshape(lengths.shape[:2]).astype(np.int64) * ALIGN
    return tile[..., None] + np.cumsum(lengths, axis=2) - lengths


def _lengths(blob: np.ndarray, layout: Layout) -> np.ndarray:
    shape = (layout.row_tiles, layout.col_tiles, TILE_ROWS)
    return blob[layout.extra :][: math.prod(shape)].reshape(shape).astype(np.int64)


def _write_streams(out: np.ndarray, starts: np.ndarray, codes: np.ndarray) -> None:
    """``codes``: uint32 (row tile, column tile, lane, column), ``length << 16 | code``."""
    at = 8 * starts
    for column in np.moveaxis(codes, 3, 0).astype(np.int64):
        piece = (column & 0xFFFF) << (at & 7)
        for byte in range(3):
            np.bitwise_or.at(out, (at >> 3) + byte, (piece >> 8 * byte & 255).astype(np.uint8))
        at += column >> 16


def _read_streams(
    blob: np.ndarray, layout: Layout, row_tiles: slice
) -> tuple[np.ndarray, int | None]:
    """The symbols (row tile, column tile, lane, column), and a tile that is damaged, or None."""
    data = blob[layout.codes :]
    table = _table(blob, layout).view("<u2")
    starts, lengths = (part(blob, layout)[row_tiles] for part in (_starts, _lengths))
    index = layout.index_of(blob).astype(np.int64) * ALIGN
    tile_end = index[1:].reshape(layout.row_tiles, layout.col_tiles)[row_tiles]
    row = np.arange(TILE_ROWS * layout.row_tiles).reshape(-1, 1, TILE_ROWS)[row_tiles]
    used = np.minimum(TILE_COLS, layout.cols - TILE_COLS * np.arange(layout.col_tiles))[:, None]
    used = np.where(row < layout.rows, used, 0)

    at = 8 * starts
    symbols = np.zeros((*starts.shape, TILE_COLS), np.uint8)
    for column in range(TILE_COLS):
        byte = np.minimum(at >> 3, data.size - 3)
        bits = data[byte] | data[byte + 1].astype(np.int64) << 8 | data[byte + 2].astype(int) << 16
        entry = table[bits >> (at & 7) & (1 << WINDOW) - 1]
        symbols[..., column] = entry >> 8
        at += np.where(column < used, entry & 255, 0)

    filled = starts[..., -1] + lengths[..., -1]
    last = data[np.minimum(np.maximum(at - 1, 0) >> 3, data.size - 1)]
    wrong = (-(-at // 8) != starts + lengths) | ((at & 7 != 0) & (last >> (at & 7) != 0))
    damaged = wrong.any(axis=2) | (-(-filled // ALIGN) * ALIGN != tile_end)
    damaged |= tile_end > layout.nbytes - ALIGN - layout.codes
    damaged_tiles = np.flatnonzero(damaged)
    if damaged_tiles.size:
        return symbols, int(damaged_tiles[0]) + row_tiles.start * layout.col_tiles
    for tile in range(damaged.size):
        if data[filled.flat[tile] : tile_end.flat[tile]].any():
            return symbols, tile + row_tiles.start * layout.col_tiles
    return symbols, None
