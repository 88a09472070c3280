"""The public functions: regrouping of chunks, headers and tails around a backend's segments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from compress.codec.backends import backend, choose, threads_or_all
from compress.codec.format import (
    BLOCK_LOG2,
    GROUP_BLOCKS,
    HEADER_MAX,
    TAIL,
    Header,
    make_header,
    parse_header,
)
from compress.codec.segment import HEAD, parse_head
from compress.errors import BadInput, Corrupt, Missing

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

__all__ = ["backend", "decode", "decode_part", "decode_stream", "encode", "predict", "read_header"]

_RUN = 1 << 24  # bytes handed to the backend at once, rounded to whole groups


def encode(
    name: str,
    dtype: str,
    shape: Sequence[int],
    chunks: Iterable[Buffer],
    threads: int | None = None,
) -> Iterator[bytes | memoryview]:
    """The coded tensor (1-D ``U8``) in consecutive pieces; memory: a few runs of 32 MiB.

    ``chunks``: the tensor's little-endian bytes, in pieces of any sizes. ``dtype`` as safetensors
    spells it. Every piece has been decoded again and compared before it is given out. Raises
    `BadInput` for an unknown dtype, a shape the format cannot hold, or another number of bytes than
    dtype and shape ask for.
    """
    return _encode(make_header(name, dtype, shape), name, chunks, threads_or_all(threads))


def _encode(
    header: Header, name: str, chunks: Iterable[Buffer], threads: int
) -> Iterator[bytes | memoryview]:
    coder = choose()
    yield header.pack()
    coded, done = header.size, 0
    for run in _runs(_exactly(header.nbytes, chunks, name), header.width):
        segments = memoryview(coder.encode(run, header.width, header.rotate, threads))
        coded += segments.nbytes
        done += run.size
        yield segments
    yield header.tail(coded)


def predict(
    dtype: str,
    chunks: Iterable[Buffer],
    shape: Sequence[int],
    threads: int | None = None,
) -> int:
    """Exact bytes of the coded tensor, header and tail included, from histograms alone.

    Arguments and errors as those of `encode`.
    """
    header = make_header("", dtype, shape)
    coder, threads = choose(), threads_or_all(threads)
    segments: int = sum(
        coder.predict(run, header.width, header.rotate, threads)
        for run in _runs(_exactly(header.nbytes, chunks, None), header.width)
    )
    end = header.size + segments
    return end + len(header.tail(end))


def read_header(prefix: Buffer, name: str | None = None) -> Header:
    """Parse and check the header at the start of a coded tensor.

    ``prefix``: its first `HEADER_MAX` bytes, or all of a shorter one. ``name``: compared where
    given. Raises `Corrupt`, or `BadInput` if only a newer release can read the tensor.
    """
    return parse_header(memoryview(prefix).cast("B"), name)


def decode(
    blob: Buffer,
    name: str | None = None,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """The decoded bytes of a whole coded tensor, as 1-D uint8.

    ``out``: a contiguous 1-D uint8 array of exactly that size to decode into. All lengths are held
    against ``blob`` before anything is allocated. Raises `Corrupt`, `BadInput` as `read_header`,
    `Missing` if memory does not suffice.
    """
    import numpy as np

    data = np.frombuffer(memoryview(blob), np.uint8)
    header = parse_header(data.data, name)
    end, left = header.size, header.words
    while left:
        head = parse_head(
            data[end : end + HEAD.size].data, left, header.width, header.block_log2, name
        )
        end += head.size
        left -= head.words
    _check_tail(header, end, data[end : end + TAIL + 2].tobytes(), name)
    if out is None:
        out = _allocate(header.nbytes, name)
    elif out.dtype != np.uint8 or out.shape != (header.nbytes,) or not out.flags.carray:
        raise ValueError(f"out must be writable contiguous uint8 of shape ({header.nbytes},)")
    with _naming(name):
        choose().decode(
            data[header.size :],
            end - header.size,
            header.words,
            header.width,
            header.rotate,
            header.block_log2,
            out,
            threads_or_all(threads),
        )
    return out


def decode_part(
    blob: Buffer, begin: int, end: int, name: str | None = None, threads: int | None = None
) -> np.ndarray:
    """The decoded bytes of words ``begin`` to ``end`` of a coded tensor, as 1-D uint8.

    Only the segments that hold any of them are decoded. Raises as `decode`, `ValueError` for words
    that the tensor does not have.
    """
    import numpy as np

    data = np.frombuffer(memoryview(blob), np.uint8)
    header = parse_header(data.data, name)
    if not 0 <= begin <= end <= header.words:
        raise ValueError(f"words {begin} to {end} of {header.words}")
    at, word = header.size, 0
    first, skipped = at, 0
    while word < end:
        head = parse_head(
            data[at : at + HEAD.size].data,
            header.words - word,
            header.width,
            header.block_log2,
            name,
        )
        at, word = at + head.size, word + head.words
        if word <= begin:
            first, skipped = at, word
    if data.size < at + TAIL:
        raise _truncated(name)
    out = _allocate((word - skipped) * header.width, name)
    with _naming(name):
        choose().decode(
            data[first:],
            at - first,
            word - skipped,
            header.width,
            header.rotate,
            header.block_log2,
            out,
            threads_or_all(threads),
        )
    return out[(begin - skipped) * header.width : (end - skipped) * header.width]


def decode_stream(
    read: Callable[[int], bytes],
    nbytes_stored: int,
    name: str | None = None,
    threads: int | None = None,
) -> Iterator[np.ndarray]:
    """The decoded bytes of a coded tensor as uint8 arrays in order; memory: a few runs of 32 MiB.

    ``read(n)`` gives the next ``n`` bytes of the coded tensor, which has ``nbytes_stored`` bytes in
    all. Raises as `decode`; the end of the tensor is checked after the last array.
    """
    source = _Source(read, nbytes_stored, name)
    prefix = source.take(min(HEADER_MAX, nbytes_stored))
    header = parse_header(prefix, name)
    source.give_back(prefix[header.size :])
    coder, threads = choose(), threads_or_all(threads)
    left, index = header.words, 0
    while left:
        run = bytearray()
        words = segments = 0
        while words < left and words * header.width < _RUN:
            front = source.take(HEAD.size)
            head = parse_head(front, left - words, header.width, header.block_log2, name)
            run += front
            run += source.take(head.size - HEAD.size)
            words += head.words
            segments += 1
        nbytes = len(run)
        run += bytes(TAIL)
        out = _allocate(words * header.width, name)
        with _naming(name, index):
            coder.decode(
                run, nbytes, words, header.width, header.rotate, header.block_log2, out, threads
            )
        yield out
        left -= words
        index += segments
    end = source.at
    _check_tail(header, end, source.take(min(nbytes_stored - end, TAIL + 2)), name)


class _Source:
    """Reads ahead of what is parsed, never past the tensor's end."""

    def __init__(self, read: Callable[[int], bytes], nbytes: int, name: str | None) -> None:
        self._read, self._nbytes, self._name = read, nbytes, name
        self._ahead = b""
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > self._nbytes - self.at:
            raise _truncated(self._name)
        data, self._ahead = self._ahead[:count], self._ahead[count:]
        if len(data) < count:
            data += self._read(count - len(data))
        if len(data) < count:
            raise _truncated(self._name)
        self.at += count
        return data

    def give_back(self, data: bytes) -> None:
        self._ahead = data + self._ahead
        self.at -= len(data)


def _check_tail(header: Header, end: int, tail: bytes, name: str | None) -> None:
    if tail != header.tail(end):
        raise Corrupt(
            "does not end as a coded tensor must: truncated, overwritten, or bytes follow",
            where=name,
        )


def _truncated(name: str | None) -> Corrupt:
    return Corrupt("truncated: the coded tensor ends early", where=name)


def _allocate(nbytes: int, name: str | None) -> np.ndarray:
    import numpy as np

    try:
        return np.empty(nbytes, np.uint8)
    except (MemoryError, ValueError):
        raise Missing(f"not enough memory for {nbytes:,} decoded bytes", where=name) from None


@contextmanager
def _naming(name: str | None, first_segment: int = 0) -> Iterator[None]:
    """Put the tensor in front of what the backend, which knows only segments, found corrupt."""
    try:
        yield
    except Corrupt as error:
        place = f", counting from segment {first_segment}" if first_segment else ""
        raise Corrupt(f"{error}{place}", where=name) from error


def _exactly(nbytes: int, chunks: Iterable[Buffer], name: str | None) -> Iterator[Buffer]:
    """``chunks``, `BadInput` unless they hold ``nbytes`` bytes in all."""
    got = 0
    for chunk in chunks:
        got += memoryview(chunk).nbytes
        if got > nbytes:
            break
        yield chunk
    if got != nbytes:
        raise BadInput(
            "the bytes given disagree with dtype and shape",
            where=name,
            got=f"{got} or more" if got > nbytes else got,
            expected=nbytes,
        )


def _runs(chunks: Iterable[Buffer], width: int) -> Iterator[np.ndarray]:
    """``chunks`` regrouped into runs of whole groups; only the last may be shorter."""
    import numpy as np

    group = (GROUP_BLOCKS << BLOCK_LOG2) * width
    size = max(1, _RUN // group) * group
    pending = np.empty(0, np.uint8)
    filled = 0
    for chunk in chunks:
        view = memoryview(chunk)
        data = np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
        while data.size:
            if not filled and data.size >= size:
                yield data[:size]
                data = data[size:]
                continue
            if not pending.size:
                pending = np.empty(size, np.uint8)
            take = min(size - filled, data.size)
            pending[filled : filled + take] = data[:take]
            data = data[take:]
            filled += take
            if filled == size:
                yield pending
                pending, filled = np.empty(0, np.uint8), 0
    if filled:
        yield pending[:filled]
