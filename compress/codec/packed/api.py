"""The public functions: an engine counts, codes and decodes, this file does the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from compress.codec import backends
from compress.codec.packed.layout import HEADER, TILE_ROWS, Layout, check_kind, parse, plan
from compress.codec.packed.soundness import check_sections
from compress.codec.packed.tables import tables
from compress.errors import Corrupt

if TYPE_CHECKING:
    import numpy as np

_RUN = 1 << 21  # words unpacked at once to be compared, few enough for a cache


class Engine(Protocol):
    """What an implementation offers: `compress.codec.packed.reference` or ``native``.

    ``words``: uint16 (rows, cols), contiguous; ``code``: of `Tables`; tiles as PACKED.md numbers
    them.
    """

    def histogram(self, words: np.ndarray, layout: str, threads: int) -> np.ndarray:
        """Counts of the coded bytes, int64[256]."""

    def measure(
        self, words: np.ndarray, layout: str, code: np.ndarray, threads: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The index, int64[tiles + 1], and the lane lengths, uint8[32 * tiles] (dense) or None."""

    def write(
        self, words: np.ndarray, blob: np.ndarray, layout: Layout, code: np.ndarray, threads: int
    ) -> None:
        """Fill low plane, codes and escapes of a blob of zeros with index and lane lengths."""

    def unpack(
        self, blob: np.ndarray, layout: Layout, first: int, out: np.ndarray, threads: int
    ) -> int | None:
        """Decode rows from ``first`` on into ``out``; a tile that is damaged, or None.

        Whatever the blob holds, nothing outside it and ``out`` is touched.
        """

    def check(self, blob: np.ndarray, layout: Layout, threads: int) -> int | None:
        """A tile whose streams or escapes are damaged, or None."""


def seal(blob: np.ndarray, layout: Layout) -> None:
    """Write the header in front of a blob (uint8, ``layout.nbytes``) that is otherwise complete."""
    import numpy as np

    crc = backends.choose().crc32c(blob[HEADER:])
    blob[:HEADER] = np.frombuffer(layout.pack(crc), np.uint8)


def pack(
    words: np.ndarray,
    dtype: str,
    layout: str,
    *,
    threads: int | None = None,
    where: str | None = None,
) -> np.ndarray:
    """The packed weight (1-D uint8) of a matrix of 16-bit words.

    ``words``: uint16 (rows, cols), C-contiguous; ``dtype``: ``BF16`` or ``F16``; ``layout``:
    ``fast`` or ``dense``; ``where``: what errors call the matrix. The blob has been unpacked again
    and compared. It may be larger than the matrix: see `Layout.nbytes` and `Layout.words_nbytes`.
    Raises `BadInput` for an unknown layout or dtype, an empty matrix, or one too large.
    """
    import numpy as np

    if words.dtype != np.uint16 or words.ndim != 2 or not words.flags.c_contiguous:
        raise ValueError("words must be a C-contiguous matrix of uint16")
    rows, cols = words.shape
    check_kind(layout, dtype, rows, cols, where)
    engine, threads = _engine(), backends.threads_or_all(threads)
    made = tables(engine.histogram(words, layout, threads), layout)
    index, lengths = engine.measure(words, layout, made.code, threads)
    planned = plan(layout, dtype, rows, cols, int(index[-1]), where)
    blob = np.zeros(planned.nbytes, np.uint8)
    _place(blob, planned.table, made.table)
    _place(blob, planned.index, index.astype("<u4").view(np.uint8))
    if lengths is not None:
        _place(blob, planned.extra, lengths)
    engine.write(words, blob, planned, made.code, threads)
    seal(blob, planned)
    strip = max(1, _RUN // (cols * TILE_ROWS)) * TILE_ROWS
    out = np.empty((min(strip, rows), cols), np.uint16)
    for first in range(0, rows, strip):
        part = words[first : first + strip]
        got = out[: len(part)]
        damaged = engine.unpack(blob, planned, first, got, threads)
        if damaged is not None or not np.array_equal(got, part):
            raise Corrupt(
                "does not unpack to what was packed: memory or processor fault", where=where
            )
    return blob


def unpack(
    blob: np.ndarray,
    rows: slice | None = None,
    *,
    threads: int | None = None,
    where: str | None = None,
) -> np.ndarray:
    """The words of a packed weight, uint16 (n, cols).

    ``rows``: which ones, from a multiple of 32 on and without step; all if None. Of the blob only
    the header and what decoding needs is checked, not its checksum: `check` does that, once.
    Raises `Corrupt`, `BadInput` as `parse`.
    """
    layout = _parse(blob, where)
    first, end, step = (rows or slice(None)).indices(layout.rows)
    count = max(0, end - first)
    if step != 1 or (count and first % TILE_ROWS):
        raise ValueError(f"rows must begin at a multiple of {TILE_ROWS} and have no step")
    return _unpack(blob, layout, first, count, backends.threads_or_all(threads), where)


def check(blob: np.ndarray, where: str | None = None, *, threads: int | None = None) -> Layout:
    """The layout of a packed weight (1-D uint8) all of which has been proven sound.

    Checked are the header, the checksum, the table, the index, the padding, and every lane: that
    its stream ends where its length says, or that its escapes are those listed. Raises `Corrupt`,
    or `BadInput` if only a newer release can read the weight.
    """
    layout = _parse(blob, where)
    stored_crc = int.from_bytes(blob[HEADER - 8 : HEADER - 4].tobytes(), "little")
    if backends.choose().crc32c(blob[HEADER:]) != stored_crc:
        raise Corrupt("the packed weight's checksum differs", where=where)
    check_sections(blob, layout, where)
    _raise_damaged(_engine().check(blob, layout, backends.threads_or_all(threads)), layout, where)
    return layout


def _place(blob: np.ndarray, offset: int, section: np.ndarray) -> None:
    blob[offset : offset + section.size] = section


def _parse(blob: np.ndarray, where: str | None) -> Layout:
    import numpy as np

    if blob.dtype != np.uint8 or blob.ndim != 1 or not blob.flags.c_contiguous:
        raise ValueError("a packed weight is contiguous 1-D uint8")
    layout = parse(blob[:HEADER].tobytes(), where)
    if layout.nbytes != blob.size:
        raise Corrupt(
            "the packed weight has another size than its header says",
            where=where,
            got=blob.size,
            expected=layout.nbytes,
        )
    return layout


def _unpack(
    blob: np.ndarray, layout: Layout, first: int, count: int, threads: int, where: str | None
) -> np.ndarray:
    import numpy as np

    out = np.empty((count, layout.cols), np.uint16)
    if count:
        _raise_damaged(_engine().unpack(blob, layout, first, out, threads), layout, where)
    return out


def _raise_damaged(tile: int | None, layout: Layout, where: str | None) -> None:
    if tile is not None:
        row, col = divmod(tile, layout.col_tiles)
        raise Corrupt(
            f"the packed weight's tile at row {32 * row}, column {128 * col} is damaged",
            where=where,
        )


def _engine() -> Engine:
    if backends.choose().NAME == "native":
        from compress.codec.packed import native

        return native
    from compress.codec.packed import reference

    return reference
