"""Segments of a coded tensor: head, plane records and directory, packed and parsed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from compress.codec.checksum import crc32c
from compress.codec.format import GROUP_BLOCKS, MAX_CODE_BITS, STREAMS
from compress.errors import Corrupt

RAW, CONSTANT, HUFFMAN = 0, 1, 2
HEAD = struct.Struct("<IIQ")
_LONGEST_RECORD = 3 + 256 // 2


@dataclass(frozen=True)
class Plane:
    """How a segment codes one plane: ``value`` of a constant, 256 code ``lengths`` of Huffman."""

    mode: int
    value: int = 0
    lengths: tuple[int, ...] = ()

    def pack(self) -> bytes:
        if self.mode != HUFFMAN:
            return bytes([self.mode, self.value][: 1 + (self.mode == CONSTANT)])
        used = [symbol for symbol, length in enumerate(self.lengths) if length]
        first, last = used[0], used[-1]
        nibbles = [*self.lengths[first : last + 1], 0]
        pairs = zip(nibbles[::2], nibbles[1::2], strict=False)
        return bytes([HUFFMAN, first, last, *(low | high << 4 for low, high in pairs)])


@dataclass(frozen=True)
class SegmentHead:
    """The first 16 bytes of a segment, and the ``words`` it covers."""

    words: int
    n_blocks: int
    meta_bytes: int
    payload_bytes: int

    @property
    def size(self) -> int:
        return self.meta_bytes + self.payload_bytes


@dataclass(frozen=True)
class Block:
    """A block's directory entry.

    ``streams``: for each Huffman plane in order its `STREAMS` lengths in bytes; ``payload``: where
    the block's bytes start in the segment's payload. ``crc`` is None if all planes are constant.
    """

    words: int
    payload: int
    crc: int | None
    streams: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Segment:
    planes: tuple[Plane, ...]
    blocks: tuple[Block, ...]


def parse_head(
    data: bytes | memoryview, words_left: int, width: int, block_log2: int, where: str | None = None
) -> SegmentHead:
    """Parse the head at the start of ``data`` and hold it against what is possible.

    Whatever the bytes say, the sizes returned are at most those of the largest segment that the
    ``words_left`` words of the tensor allow. Raises `Corrupt`.
    """
    if len(data) < HEAD.size:
        raise Corrupt("truncated: the segments end before the tensor does", where=where)
    n_blocks, meta_bytes, payload_bytes = HEAD.unpack_from(data)
    most_blocks = min(GROUP_BLOCKS, -(-words_left >> block_log2))
    if not 1 <= n_blocks <= most_blocks:
        raise Corrupt(
            "the segment's number of blocks is not possible",
            where=where,
            got=n_blocks,
            expected=f"1 to {most_blocks}",
        )
    words = min(words_left, n_blocks << block_log2)
    fixed = HEAD.size + 4
    most_meta = fixed + width * _LONGEST_RECORD + n_blocks * (4 + 2 * STREAMS * width)
    most_payload = width * (words * MAX_CODE_BITS // 8 + STREAMS * n_blocks)
    if not fixed + width <= meta_bytes <= most_meta or payload_bytes > most_payload:
        raise Corrupt("the segment's sizes are not possible", where=where)
    return SegmentHead(words, n_blocks, meta_bytes, payload_bytes)


def parse_segment(
    data: bytes | memoryview, head: SegmentHead, width: int, block_log2: int, where: str | None
) -> Segment:
    """Parse and check the ``head.meta_bytes`` bytes at the start of ``data``. Raises `Corrupt`."""

    def check(good: bool, what: str) -> None:
        if not good:
            raise Corrupt(what, where=where)

    end = head.meta_bytes - 4
    meta = bytes(data[:end])
    stored_crc = int.from_bytes(data[end : end + 4], "little")
    check(crc32c(meta) == stored_crc, "the checksum of the segment's tables differs")
    planes, at = [], HEAD.size
    for _ in range(width):
        plane, size = _parse_plane(meta[at:], where)
        planes.append(plane)
        at += size
    modes = [plane.mode for plane in planes]
    raw, huffman, entry_bytes = modes.count(RAW), modes.count(HUFFMAN), _entry_bytes(modes)
    check(end - at == head.n_blocks * entry_bytes, "the segment's directory has a wrong size")
    blocks, payload = [], 0
    for index in range(head.n_blocks):
        words = min(1 << block_log2, head.words - (index << block_log2))
        crc = None
        lengths: tuple[int, ...] = ()
        if entry_bytes:
            crc, *lengths_list = struct.unpack_from(f"<I{STREAMS * huffman}H", meta, at)
            lengths = tuple(lengths_list)
            at += entry_bytes
        streams = tuple(lengths[i : i + STREAMS] for i in range(0, len(lengths), STREAMS))
        blocks.append(Block(words, payload, crc, streams))
        payload += raw * words + sum(lengths)
    check(payload == head.payload_bytes, "the segment's stream lengths do not fill its payload")
    return Segment(tuple(planes), tuple(blocks))


def _parse_plane(record: bytes, where: str | None) -> tuple[Plane, int]:
    """The plane at the start of ``record`` and the record's size."""
    if record[:1] == bytes([RAW]):
        return Plane(RAW), 1
    if record[:1] == bytes([CONSTANT]) and len(record) > 1:
        return Plane(CONSTANT, value=record[1]), 2
    if record[:1] == bytes([HUFFMAN]) and len(record) > 3:
        first, last = record[1], record[2]
        count = last - first + 1
        packed = record[3 : 3 + (count + 1) // 2]
        nibbles = [nibble for byte in packed for nibble in (byte & 15, byte >> 4)]
        if count > 1 and len(nibbles) >= count and not any(nibbles[count:]):
            lengths = (*[0] * first, *nibbles[:count], *[0] * (255 - last))
            filled = sum(1 << MAX_CODE_BITS >> length for length in lengths if length)
            if (
                lengths[first]
                and lengths[last]
                and max(lengths) <= MAX_CODE_BITS
                and filled == 1 << MAX_CODE_BITS
            ):
                return Plane(HUFFMAN, lengths=lengths), 3 + len(packed)
    raise Corrupt("a plane record or Huffman table is not valid", where=where)


def meta_bytes(planes: Sequence[Plane], n_blocks: int) -> int:
    """Bytes of a segment before its payload."""
    modes = [plane.mode for plane in planes]
    size = HEAD.size + sum(len(plane.pack()) for plane in planes) + 4
    return size + (n_blocks * _entry_bytes(modes))


def _entry_bytes(modes: Sequence[int]) -> int:
    """Bytes of a block's directory entry for planes of these modes."""
    if all(mode == CONSTANT for mode in modes):
        return 0
    return 4 + 2 * STREAMS * modes.count(HUFFMAN)


def pack_segment(
    planes: Sequence[Plane],
    crcs: Sequence[int],
    streams: Sequence[Sequence[int]],
    payload: Sequence[bytes | memoryview],
) -> list[bytes | memoryview]:
    """A segment as consecutive pieces.

    ``crcs`` and ``streams`` (stream lengths, all Huffman planes in order) have an item for each
    block; ``payload``: the blocks' bytes in any pieces.
    """
    meta = b"".join(plane.pack() for plane in planes)
    if any(plane.mode != CONSTANT for plane in planes):
        for crc, lengths in zip(crcs, streams, strict=True):
            meta += struct.pack(f"<I{len(lengths)}H", crc, *lengths)
    meta = HEAD.pack(len(crcs), HEAD.size + len(meta) + 4, sum(map(len, payload))) + meta
    return [meta + struct.pack("<I", crc32c(meta)), *payload]
