"""The oracle: docs/FORMAT.md as plain Python on ints and bytes, slow and short.

Other implementations must give the same bytes. The encoder's decisions are in `huffman`, the layout
of segments in `segment`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from compress.codec.checksum import crc32c
from compress.codec.format import (
    BLOCK_LOG2,
    GROUP_BLOCKS,
    STREAMS,
    make_header,
    parse_header,
)
from compress.codec.huffman import add_counts, canonical_codes, plan_plane, segment_blocks
from compress.codec.segment import (
    CONSTANT,
    HEAD,
    HUFFMAN,
    RAW,
    Block,
    Plane,
    pack_segment,
    parse_head,
    parse_segment,
)
from compress.errors import Corrupt


def encode(data: bytes, width: int, rotate: int, block_log2: int = BLOCK_LOG2) -> bytes:
    """The segments of ``data``: a whole tensor, or a run of whole groups of it.

    ``block_log2`` other than the default gives valid segments that no writer would write.
    """
    block_bytes = width << block_log2
    blocks = [data[at : at + block_bytes] for at in range(0, len(data), block_bytes)]
    segments = []
    for first in range(0, len(blocks), GROUP_BLOCKS):
        group = blocks[first : first + GROUP_BLOCKS]
        planes = [_split(block, width, rotate) for block in group]
        counts = [[_counts(plane) for plane in block] for block in planes]
        size = segment_blocks(counts)
        for at in range(0, len(group), size):
            part = slice(at, at + size)
            segments += _encode_segment(group[part], planes[part], add_counts(counts[part]))
    return b"".join(segments)


def decode(segments: bytes, words: int, width: int, rotate: int, block_log2: int) -> bytes:
    """The bytes of ``words`` words. Raises `Corrupt`, naming segment and block."""
    out = []
    at = index = 0
    while words:
        where = f"segment {index}"
        head = parse_head(segments[at : at + HEAD.size], words, width, block_log2, where)
        if head.size > len(segments) - at:
            raise Corrupt("truncated: the segments end before the tensor does", where=where)
        segment = parse_segment(segments[at : at + head.meta_bytes], head, width, block_log2, where)
        payload = segments[at + head.meta_bytes : at + head.size]
        for number, block in enumerate(segment.blocks):
            place = f"{where}, block {number}"
            out.append(_decode_block(segment.planes, block, payload, rotate, place))
        at += head.size
        words -= head.words
        index += 1
    if at != len(segments):
        raise Corrupt("bytes follow the last segment")
    return b"".join(out)


def encode_tensor(name: str, dtype: str, shape: Sequence[int], data: bytes) -> bytes:
    """The whole coded tensor."""
    header = make_header(name, dtype, shape)
    blob = header.pack() + encode(data, header.width, header.rotate)
    return blob + header.tail(len(blob))


def decode_tensor(blob: bytes, name: str | None = None) -> bytes:
    """The decoded bytes of a whole coded tensor. Raises `Corrupt`."""
    header = parse_header(blob, name)
    end, left = header.size, header.words
    while left:
        head = parse_head(blob[end : end + HEAD.size], left, header.width, header.block_log2, name)
        end += head.size
        left -= head.words
    if blob[end:] != header.tail(end):
        raise Corrupt("does not end as a coded tensor must", where=name)
    segments = blob[header.size : end]
    return decode(segments, header.words, header.width, header.rotate, header.block_log2)


def _split(data: bytes, width: int, rotate: int) -> list[bytes]:
    """The planes of a block."""
    bits = 8 * width
    words = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
    if rotate:
        words = [(word << 1 | word >> bits - 1) & (1 << bits) - 1 for word in words]
    return [bytes(word >> 8 * p & 255 for word in words) for p in range(width)]


def _join(planes: Sequence[bytes], rotate: int) -> bytes:
    """The inverse of `_split`."""
    width, bits = len(planes), 8 * len(planes)
    words = [int.from_bytes(column, "little") for column in zip(*planes, strict=True)]
    if rotate:
        words = [word >> 1 | (word & 1) << bits - 1 for word in words]
    return b"".join(word.to_bytes(width, "little") for word in words)


def _counts(plane: bytes) -> list[int]:
    counts = Counter(plane)
    return [counts[symbol] for symbol in range(256)]


def _streams(plane: bytes) -> Iterator[bytes]:
    """The symbols of each of a block's streams."""
    size = -(-len(plane) // STREAMS)
    return (plane[i * size : (i + 1) * size] for i in range(STREAMS))


def _code_texts(plane: Plane) -> list[str]:
    """Each symbol's code as text of 0 and 1, empty where the symbol does not occur."""
    codes = canonical_codes(plane.lengths)
    return [
        format(code, f"0{length}b") if length else ""
        for code, length in zip(codes, plane.lengths, strict=True)
    ]


def _encode_segment(
    blocks: Sequence[bytes], planes: Sequence[Sequence[bytes]], counts: Sequence[Sequence[int]]
) -> list[bytes | memoryview]:
    plan = [plan_plane(plane_counts, len(blocks)) for plane_counts in counts]
    texts = [_code_texts(plane) if plane.mode == HUFFMAN else [] for plane in plan]
    payload: list[bytes] = []
    lengths: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(planes):
        for plane, text, symbols in zip(plan, texts, block, strict=True):
            if plane.mode == RAW:
                payload.append(symbols)
            elif plane.mode == HUFFMAN:
                streams = [_pack_bits("".join(text[s] for s in part)) for part in _streams(symbols)]
                payload += streams
                lengths[number] += map(len, streams)
    return pack_segment(plan, [crc32c(block) for block in blocks], lengths, payload)


def _pack_bits(text: str) -> bytes:
    """Text of 0 and 1 as bytes, the last one filled up with zeros."""
    size = -(-len(text) // 8)
    return int(text.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


def _decode_block(
    plan: Sequence[Plane], block: Block, payload: bytes, rotate: int, where: str
) -> bytes:
    planes, at = [], block.payload
    lengths = iter(block.streams)
    for plane in plan:
        if plane.mode == CONSTANT:
            planes.append(bytes([plane.value]) * block.words)
        elif plane.mode == RAW:
            planes.append(payload[at : at + block.words])
            at += block.words
        else:
            symbol_of = {text: symbol for symbol, text in enumerate(_code_texts(plane)) if text}
            symbols = b""
            sizes = [len(part) for part in _streams(bytes(block.words))]
            for count, length in zip(sizes, next(lengths), strict=True):
                symbols += _decode_stream(payload[at : at + length], count, symbol_of, where)
                at += length
            planes.append(symbols)
    data = _join(planes, rotate)
    if block.crc is not None and crc32c(data) != block.crc:
        raise Corrupt("the decoded bytes have another checksum", where=where)
    return data


def _decode_stream(stream: bytes, count: int, symbol_of: dict[str, int], where: str) -> bytes:
    text = "".join(f"{byte:08b}" for byte in stream)
    symbols: list[int] = []
    start = end = 0
    while len(symbols) < count and end < len(text):
        end += 1
        if text[start:end] in symbol_of:
            symbols.append(symbol_of[text[start:end]])
            start = end
    if len(symbols) < count or len(text) - start >= 8 or "1" in text[start:]:
        raise Corrupt("a bit stream does not end where its length says", where=where)
    return bytes(symbols)
