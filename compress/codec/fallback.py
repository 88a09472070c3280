"""The codec in numpy, for machines without a C++ compiler. Same bytes as the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.codec.fallback_checksum import crc32c_rows
from compress.codec.fallback_streams import decode_streams, pack_streams, stream_bytes
from compress.codec.format import BLOCK_LOG2, GROUP_BLOCKS
from compress.codec.huffman import add_counts, plan_plane, segment_blocks
from compress.codec.segment import (
    CONSTANT,
    HEAD,
    HUFFMAN,
    RAW,
    Block,
    Plane,
    Segment,
    meta_bytes,
    pack_segment,
    parse_head,
    parse_segment,
)
from compress.errors import Corrupt

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = "numpy fallback"

_PIECE = 1 << 19  # bytes of streams decoded at once; each of their bits takes 40 bytes of memory


def crc32c(data: Buffer) -> int:
    """CRC-32C of any contiguous buffer."""
    return int(crc32c_rows(np.frombuffer(memoryview(data), np.uint8)[None])[0])


def encode(data: np.ndarray, width: int, rotate: int, threads: int) -> bytes:
    """The segments of ``data`` (uint8, whole words), decoded again and compared."""
    pieces = []
    for group in _groups(data, width):
        planes = _split(group, width, rotate)
        segments = b"".join(
            piece
            for first, last, plan in _plan_group(planes)
            for piece in _encode_segment(group, planes, first, last, plan)
        )
        check = np.empty_like(group)
        decode(segments, len(segments), planes.shape[1], width, rotate, BLOCK_LOG2, check, threads)
        if not np.array_equal(check, group):
            raise RuntimeError("the encoder could not decode its own output")
        pieces.append(segments)
    return b"".join(pieces)


def predict(data: np.ndarray, width: int, rotate: int, threads: int) -> int:
    """The number of bytes `encode` would return."""
    total = 0
    for group in _groups(data, width):
        planes = _split(group, width, rotate)
        for first, last, plan in _plan_group(planes):
            total += meta_bytes(plan, -(-(last - first) >> BLOCK_LOG2))
            for plane, symbols in zip(plan, planes[:, first:last], strict=True):
                if plane.mode == RAW:
                    total += symbols.size
                elif plane.mode == HUFFMAN:
                    total += sum(int(stream_bytes(plane, b).sum()) for b in _blocks(symbols))
    return total


def decode(
    buffer: Buffer,
    nbytes: int,
    words: int,
    width: int,
    rotate: int,
    block_log2: int,
    out: np.ndarray,
    threads: int,
) -> None:
    """Decode ``nbytes`` of segments at the start of ``buffer`` into ``out`` (uint8, words * width).

    Raises `Corrupt`, naming segment and block.
    """
    data = np.frombuffer(memoryview(buffer), np.uint8)[:nbytes]
    at = done = index = 0
    while done < words:
        where = f"segment {index}"
        head = parse_head(data[at : at + HEAD.size].data, words - done, width, block_log2, where)
        if head.size > data.size - at:
            raise Corrupt("truncated: the segments end before the tensor does", where=where)
        segment = parse_segment(
            data[at : at + head.meta_bytes].data, head, width, block_log2, where
        )
        payload = data[at + head.meta_bytes : at + head.size]
        target = out[done * width : (done + head.words) * width]
        _decode_segment(segment, payload, rotate, target.reshape(-1, width), where)
        at += head.size
        done += head.words
        index += 1
    if at != data.size:
        raise Corrupt("bytes follow the last segment")


def _groups(data: np.ndarray, width: int) -> Iterator[np.ndarray]:
    size = (GROUP_BLOCKS << BLOCK_LOG2) * width
    return (data[at : at + size] for at in range(0, data.size, size))


def _split(data: np.ndarray, width: int, rotate: int) -> np.ndarray:
    """The planes of ``data`` as a contiguous uint8 matrix, plane × word."""
    if rotate:
        words = data.view(f"<u{width}")
        data = (words << 1 | words >> (8 * width - 1)).view(np.uint8)
    return np.ascontiguousarray(data.reshape(-1, width).T)


def _unrotate(words: np.ndarray) -> None:
    """Rotate the rows of a C-contiguous uint8 matrix, word × byte, right by one bit in place."""
    width = words.shape[1]
    values = words.reshape(-1).view(f"<u{width}")
    values[:] = values >> 1 | values << (8 * width - 1)


def _blocks(symbols: np.ndarray) -> Iterator[np.ndarray]:
    """The blocks of a plane as matrices, block × word: the full ones, then a shorter last one."""
    full = symbols.size >> BLOCK_LOG2 << BLOCK_LOG2
    if full:
        yield symbols[:full].reshape(-1, 1 << BLOCK_LOG2)
    if full < symbols.size:
        yield symbols[None, full:]


def _plan_group(planes: np.ndarray) -> Iterator[tuple[int, int, list[Plane]]]:
    """First word, end and planes of each segment of a group."""
    words = planes.shape[1]
    counts = [
        [np.bincount(p[at : at + (1 << BLOCK_LOG2)], minlength=256).tolist() for p in planes]
        for at in range(0, words, 1 << BLOCK_LOG2)
    ]
    size = segment_blocks(counts)
    for block in range(0, len(counts), size):
        run = counts[block : block + size]
        plan = [plan_plane(plane_counts, len(run)) for plane_counts in add_counts(run)]
        yield block << BLOCK_LOG2, min(words, block + size << BLOCK_LOG2), plan


def _encode_segment(
    group: np.ndarray, planes: np.ndarray, first: int, last: int, plan: Sequence[Plane]
) -> list[bytes | memoryview]:
    """A segment of the words from ``first`` to ``last`` as consecutive pieces."""
    width = len(plan)
    n_blocks = -(-(last - first) >> BLOCK_LOG2)
    payload: list[list[memoryview]] = [[] for _ in range(n_blocks)]
    lengths: list[list[int]] = [[] for _ in range(n_blocks)]
    crcs: list[int] = []
    for rows in _blocks_of_words(group, first, last, width):
        crcs += crc32c_rows(rows).tolist()
    for plane, symbols in zip(plan, planes[:, first:last], strict=True):
        block = 0
        for rows in _blocks(symbols):
            if plane.mode == RAW:
                for index, row in enumerate(rows, block):
                    payload[index].append(row.data)
            elif plane.mode == HUFFMAN:
                sizes, packed = pack_streams(plane, rows)
                ends = np.cumsum(sizes.sum(axis=1)).tolist()
                for index, end in enumerate(ends):
                    start = ends[index - 1] if index else 0
                    payload[block + index].append(packed[start:end].data)
                    lengths[block + index] += sizes[index].tolist()
            block += len(rows)
    return pack_segment(plan, crcs, lengths, [piece for block in payload for piece in block])


def _blocks_of_words(group: np.ndarray, first: int, last: int, width: int) -> Iterator[np.ndarray]:
    """The blocks' bytes as matrices, block × byte."""
    full = (last - first) >> BLOCK_LOG2
    middle = first + (full << BLOCK_LOG2)
    if full:
        yield group[first * width : middle * width].reshape(full, -1)
    if middle < last:
        yield group[None, middle * width : last * width]


def _decode_segment(
    segment: Segment, payload: np.ndarray, rotate: int, words: np.ndarray, where: str
) -> None:
    """Decode into ``words``, a C-contiguous uint8 matrix, word × byte."""
    width = words.shape[1]
    done = index = 0
    for batch in _batches(segment.blocks):
        n = batch[0].words
        part = words[done : done + len(batch) * n]
        target = part.reshape(len(batch), n, width)
        offsets = [block.payload for block in batch]
        huffman = 0
        for p, plane in enumerate(segment.planes):
            if plane.mode == CONSTANT:
                target[:, :, p] = plane.value
                continue
            if plane.mode == RAW:
                sizes = [n] * len(batch)
            else:
                sizes = [sum(block.streams[huffman]) for block in batch]
            pieces = [payload[at : at + size] for at, size in zip(offsets, sizes, strict=True)]
            if plane.mode == RAW:
                target[:, :, p] = pieces
            else:
                streams = np.array([block.streams[huffman] for block in batch])
                target[:, :, p], good = decode_streams(plane, np.concatenate(pieces), streams, n)
                if not good.all():
                    bad = index + int(np.argmin(good))
                    raise Corrupt(
                        "a bit stream does not end where its length says",
                        where=f"{where}, block {bad}",
                    )
                huffman += 1
            offsets = [at + size for at, size in zip(offsets, sizes, strict=True)]
        if rotate:
            _unrotate(part)
        if batch[0].crc is not None:
            same = crc32c_rows(part.reshape(len(batch), -1)) == [block.crc for block in batch]
            if not same.all():
                raise Corrupt(
                    "the decoded bytes have another checksum",
                    where=f"{where}, block {index + int(np.argmin(same))}",
                )
        done += len(batch) * n
        index += len(batch)


def _batches(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Runs of blocks that have equally many words and little enough to decode at once."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        streams = sum(map(sum, block.streams))
        if batch and (block.words != batch[0].words or size + streams > _PIECE):
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += streams
    yield batch
