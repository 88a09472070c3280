"""The C++ engine (``kernels/packing.h``): the GPU's lane functions, run lane by lane by threads."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from compress.codec import native
from compress.codec.packed.layout import LAYOUTS, TILE_COLS, TILE_ROWS, Layout

NAME = "native"

_NO_MEMORY, _BAD_TILE = -10, -12


def histogram(words: np.ndarray, layout: str, threads: int) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    _call("histogram", words.ctypes.data, *_matrix(words, layout), counts.ctypes.data, threads)
    return counts


def measure(
    words: np.ndarray, layout: str, code: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray | None]:
    rows, cols = words.shape
    tiles = -(-rows // TILE_ROWS) * -(-cols // TILE_COLS)
    index = np.zeros(tiles + 1, np.int64)
    lengths = np.zeros(tiles * TILE_ROWS if layout == "dense" else 0, np.uint8)
    _call(
        "measure",
        words.ctypes.data,
        *_matrix(words, layout),
        code.ctypes.data,
        index.ctypes.data,
        lengths.ctypes.data,
        threads,
    )
    return index, lengths if layout == "dense" else None


def write(
    words: np.ndarray, blob: np.ndarray, layout: Layout, code: np.ndarray, threads: int
) -> None:
    matrix = _matrix(words, layout.layout)
    _call("write", words.ctypes.data, *matrix, code.ctypes.data, blob.ctypes.data, threads)


def unpack(
    blob: np.ndarray, layout: Layout, first: int, out: np.ndarray, threads: int
) -> int | None:
    matrix = (layout.rows, layout.cols, LAYOUTS.index(layout.layout) + 1)
    return _read("unpack", blob, *matrix, first, len(out), out.ctypes.data, threads)


def check(blob: np.ndarray, layout: Layout, threads: int) -> int | None:
    matrix = (layout.rows, layout.cols, LAYOUTS.index(layout.layout) + 1)
    return _read("check", blob, *matrix, threads)


def _matrix(words: np.ndarray, layout: str) -> tuple[int, int, int]:
    return words.shape[0], words.shape[1], LAYOUTS.index(layout) + 1


def _read(name: str, blob: np.ndarray, *arguments: int) -> int | None:
    """A damaged tile, or None."""
    where = (ctypes.c_int64 * 2)()
    error = _call(name, blob.ctypes.data, blob.size, *arguments, where)
    return int(where[0]) if error else None


def _call(name: str, *arguments: Any) -> int:
    """0, or the error of a damaged tile."""
    library, reason = native.library()
    if library is None:
        raise RuntimeError(reason)
    error = int(getattr(library, f"ep_packed_{name}")(*arguments))
    if error == _NO_MEMORY:
        raise MemoryError("out of memory")
    if error not in (0, _BAD_TILE):
        raise ValueError(f"invalid arguments for packed weights: error {error}")
    return error
