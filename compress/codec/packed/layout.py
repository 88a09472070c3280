"""docs/PACKED.md as code: the header of a packed weight and where its sections lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from compress.codec.checksum import crc32c
from compress.errors import BadInput, Corrupt, did_you_mean

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"EPPK"
VERSION = 1
MIN_READER = 1
LAYOUTS = ("fast", "dense")
DTYPES = ("BF16", "F16")
HEADER = 128
ALIGN = 16
TILE_ROWS = 32
TILE_COLS = 128
GROUP_COLS = 16

_FIXED = struct.Struct("<4s4B2I6Q56xI")
_TABLE_BYTES = {"fast": 16, "dense": 2 << 12}
_MOST = 2**31 - 1  # kernels count in 32-bit integers: rows, columns, tiles, and offsets by `ALIGN`


@dataclass(frozen=True)
class Layout:
    """A packed weight's kind and geometry; the last five are offsets in bytes.

    ``layout``: one of `LAYOUTS`; ``dtype``: one of `DTYPES`; ``nbytes``: of the whole blob;
    ``extra``: of the lane lengths (dense) or the escapes (fast). Made by `plan` or `parse`.
    """

    layout: str
    dtype: str
    rows: int
    cols: int
    nbytes: int
    low: int
    codes: int
    index: int
    table: int
    extra: int

    @property
    def groups(self) -> int:
        """Groups of 16 columns in a row."""
        return -(-self.cols // GROUP_COLS)

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def col_tiles(self) -> int:
        return -(-self.cols // TILE_COLS)

    @property
    def tiles(self) -> int:
        return self.row_tiles * self.col_tiles

    @property
    def table_nbytes(self) -> int:
        return _TABLE_BYTES[self.layout]

    @property
    def words_nbytes(self) -> int:
        """Bytes of the matrix when it is not packed."""
        return 2 * self.rows * self.cols

    def index_of(self, blob: np.ndarray) -> np.ndarray:
        """The index in a blob (uint8), as uint32[tiles + 1]."""
        return blob[self.index : self.index + 4 * (self.tiles + 1)].view("<u4")

    def pack(self, body_crc: int) -> bytes:
        """The 128 bytes of the header; ``body_crc``: CRC-32C of all bytes behind it."""
        layout, dtype = LAYOUTS.index(self.layout) + 1, DTYPES.index(self.dtype) + 1
        fields = (VERSION, MIN_READER, layout, dtype, *astuple(self)[2:])
        header = _FIXED.pack(MAGIC, *fields, body_crc)
        return header + struct.pack("<I", crc32c(header))

    def ints(self) -> list[int]:
        """What `from_ints` takes: for those who must not read the header from a device."""
        layout, dtype = LAYOUTS.index(self.layout) + 1, DTYPES.index(self.dtype) + 1
        return [layout, dtype, *astuple(self)[2:]]

    @staticmethod
    def from_ints(numbers: Sequence[int]) -> Layout:
        """The layout whose `ints` these are, unchecked."""
        layout, dtype, *rest = numbers
        return Layout(LAYOUTS[layout - 1], DTYPES[dtype - 1], *rest)


def plan(
    layout: str, dtype: str, rows: int, cols: int, measured: int, where: str | None = None
) -> Layout:
    """The layout of a matrix whose index ends with ``measured``.

    ``measured``: units of 16 bytes that the streams take (dense), or the number of escapes (fast).
    Raises `BadInput` for an unknown layout or dtype, an empty matrix, or one too large.
    """
    check_kind(layout, dtype, rows, cols, where)
    tiles = -(-rows // TILE_ROWS) * -(-cols // TILE_COLS)
    groups = -(-rows // TILE_ROWS) * -(-cols // GROUP_COLS)
    dense = layout == "dense"
    table = HEADER
    index = table + _TABLE_BYTES[layout]
    lengths = _aligned(index + 4 * (tiles + 1))
    low = lengths + tiles * TILE_ROWS * dense
    codes = low + groups * TILE_ROWS * 16
    escapes = codes + (measured * ALIGN if dense else groups * TILE_ROWS * 8)
    nbytes = _aligned(escapes + 4 * measured * (not dense)) + ALIGN
    if max(rows, cols, tiles, measured, nbytes // ALIGN) > _MOST:
        raise BadInput(
            "too large a matrix to be packed",
            where=where,
            got=f"{rows} x {cols}",
            expected="less than 32 GiB packed",
        )
    extra = lengths if dense else escapes
    return Layout(layout, dtype, rows, cols, nbytes, low, codes, index, table, extra)


def check_kind(layout: str, dtype: str, rows: int, cols: int, where: str | None = None) -> None:
    """`BadInput` unless a matrix of this dtype and shape can be packed in this layout."""
    if layout not in LAYOUTS:
        hint = did_you_mean(layout, LAYOUTS)
        raise BadInput(f"unknown layout '{layout}' of packed weights", where=where, mend=hint)
    if dtype not in DTYPES:
        raise BadInput("only 16-bit floats can be packed", where=where, got=dtype, expected=DTYPES)
    if rows < 1 or cols < 1:
        raise BadInput("an empty matrix cannot be packed", where=where, got=f"{rows} x {cols}")


def parse(prefix: bytes | memoryview, where: str | None = None) -> Layout:
    """The layout that the 128 bytes at the start of a packed weight tell.

    Raises `Corrupt` unless every field is what `plan` would give, `BadInput` if only a newer
    release can read the weight.
    """

    def check(good: bool, what: str) -> None:
        if not good:
            raise Corrupt(what, where=where)

    header = bytes(prefix[:HEADER])
    check(len(header) == HEADER, "truncated within the header of the packed weight")
    magic, version, min_reader, layout, dtype, *numbers, _ = _FIXED.unpack_from(header)
    check(magic == MAGIC, "is not a packed weight: the first bytes are not EPPK")
    if min_reader > VERSION:
        raise BadInput(
            f"needs a reader of packed weights {min_reader}, this one knows up to {VERSION}",
            where=where,
            mend="upgrade entropress",
        )
    stored_crc = int.from_bytes(header[-4:], "little")
    check(crc32c(header[:-4]) == stored_crc, "the header's checksum differs")
    check(1 <= min_reader <= version and not any(header[64:120]), "the header is not valid")
    check(
        layout in (1, 2) and dtype in (1, 2) and min(numbers) > 0,
        "the header names no layout, dtype or shape of packed weights",
    )
    told = Layout(LAYOUTS[layout - 1], DTYPES[dtype - 1], *numbers)
    try:
        empty = plan(told.layout, told.dtype, told.rows, told.cols, 0, where)
        room = max(0, told.nbytes - empty.nbytes)
        most = room // (ALIGN if told.layout == "dense" else 4)
        check(told == plan(told.layout, told.dtype, told.rows, told.cols, most, where), _SIZES)
    except BadInput:
        raise Corrupt(_SIZES, where=where) from None
    return told


_SIZES = "the header's shape, offsets and size contradict each other"


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
