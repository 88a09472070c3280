"""Every flipped bit, truncation and lie is found, and none makes anything large."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress import codec
from compress.codec import checksum, reference
from compress.codec.format import TAIL, Header
from compress.errors import BadInput, Corrupt, Missing

NAME = "layers.0.weight"
WEIGHTS = (np.random.default_rng(1).standard_normal(24) * 0.02).astype("<f4")
TENSORS = {
    "huffman and raw": ("BF16", (6, 8), WEIGHTS.tobytes()),
    "constant": ("F32", (9,), bytes([0, 0, 0x80, 0x3F]) * 9),
    "raw": ("U8", (40,), bytes(range(40))),
    "empty": ("I8", (0, 4), b""),
}


def stream(blob, name=NAME):
    pieces = codec.decode_stream(io.BytesIO(blob).read, len(blob), name)
    return b"".join(piece.tobytes() for piece in pieces)


def coded(kind):
    return reference.encode_tensor(NAME, *TENSORS[kind])


def with_crc(body):
    return body + struct.pack("<I", checksum.crc32c(body))


@pytest.mark.parametrize("kind", TENSORS)
def test_every_flipped_bit_is_found(backend, kind):
    blob = coded(kind)
    assert codec.decode(blob, NAME).tobytes() == stream(blob) == TENSORS[kind][2]
    for bit in range(8 * len(blob)):
        broken = bytearray(blob)
        broken[bit // 8] ^= 1 << bit % 8
        # A newer minimum reader is the one field that cannot be told from a newer writer's.
        expected = (Corrupt, BadInput) if bit // 8 == 5 else Corrupt
        with pytest.raises(expected):
            codec.decode(broken, NAME)
        with pytest.raises(expected):
            stream(bytes(broken))


@pytest.mark.parametrize("kind", TENSORS)
def test_every_truncation_is_found(backend, kind):
    blob = coded(kind)
    for size in range(len(blob)):
        with pytest.raises(Corrupt, match=NAME):
            codec.decode(blob[:size], NAME)
        with pytest.raises(Corrupt, match=NAME):
            stream(blob[:size])
        with pytest.raises(Corrupt, match="truncated"):
            list(codec.decode_stream(io.BytesIO(blob[:size]).read, len(blob), NAME))


@pytest.mark.parametrize("more", [b"\0", b"x", bytes(1000)])
def test_bytes_after_the_tail_are_found(backend, more):
    blob = coded("raw") + more
    with pytest.raises(Corrupt, match="bytes follow"):
        codec.decode(blob, NAME)
    with pytest.raises(Corrupt, match="bytes follow"):
        stream(blob)


def test_another_name_is_found():
    with pytest.raises(Corrupt, match=r"^other: .* under another name"):
        codec.decode(coded("raw"), "other")
    assert codec.decode(coded("raw")).tobytes() == TENSORS["raw"][2]
    with pytest.raises(Corrupt, match="another name"):
        codec.read_header(coded("raw"), "\ud800")


def test_a_newer_tensor_asks_for_an_upgrade():
    with pytest.raises(BadInput, match=f"{NAME}: needs a reader of format 2.*upgrade entropress"):
        codec.decode(b"EPTR\x02\x02" + coded("raw")[6:], NAME)


def test_a_newer_writer_is_read_where_it_allows_it():
    blob = coded("raw")
    header = codec.read_header(blob)
    newer = Header(**{**vars(header), "version": 7}).pack() + blob[header.size :]
    assert codec.decode(newer, NAME).tobytes() == TENSORS["raw"][2]


HEADERS = {
    "no minimum reader": {"min_reader": 0},
    "version below its reader": {"version": 0},
    "width": {"width": 3},
    "rotate": {"rotate": 2},
    "block too small": {"block_log2": 2},
    "block too large": {"block_log2": 19},
    "dtype": {"dtype": "U7"},
    "dtype and words": {"dtype": "I16"},
    "shape": {"shape": (41,)},
    "words": {"words": 1 << 63, "shape": (40,)},
    "too many dimensions": {"shape": (40, *[1] * 8)},
}


@pytest.mark.parametrize("lie", HEADERS)
def test_inconsistent_headers_are_found(lie):
    blob = coded("raw")
    header = codec.read_header(blob)
    broken = Header(**{**vars(header), **HEADERS[lie]}).pack() + blob[header.size :]
    with pytest.raises(Corrupt, match=f"{NAME}: .*header"):
        codec.decode(broken, NAME)


def segments_of(blob):
    header = codec.read_header(blob)
    return header, blob[header.size : len(blob) - TAIL]


def test_huge_lengths_allocate_nothing(backend):
    many = 1 << 60
    header = Header("U8", (many,), 1, 0, 18, many, codec.read_header(coded("raw")).name_crc)
    heads = [
        (0xFFFFFFFF, 22, 0),
        (1, 0xFFFFFFFF, 0),
        (1, 22, (1 << 64) - 1),
        (16, 22, 1 << 50),
        (16, 60, 6 << 20),
        (0, 22, 0),
        (1, 20, 0),
    ]
    for head in heads:
        blob = header.pack() + struct.pack("<IIQ", *head) + bytes(100)
        tracemalloc.start()
        with pytest.raises(Corrupt):
            codec.decode(blob, NAME)
        with pytest.raises(Corrupt):
            stream(blob)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 20


def test_segments_of_too_many_blocks_are_refused(backend):
    for n_blocks in (16, 17):
        words = 8 * n_blocks
        segment = with_crc(struct.pack("<IIQ", n_blocks, 22, 0) + b"\x01a")
        blob = Header("U8", (words,), 1, 0, 3, words, 0).pack() + segment + bytes(TAIL)
        if n_blocks == 16:
            assert codec.decode(blob).tobytes() == b"a" * words
        else:
            with pytest.raises(Corrupt, match="number of blocks .* got 17, expected 1 to 16"):
                codec.decode(blob)


def test_more_memory_than_there_is(monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(Missing, match=f"{NAME}: not enough memory for 40 "):
        codec.decode(coded("raw"), NAME)


DATA = b"aaaaaaaabbbbccdd"  # lengths 1, 2, 3, 3; two symbols in each of eight streams of a byte
RECORD = bytes([2, ord("a"), ord("d"), 0x21, 0x33])
SIZES = struct.pack("<8H", *[1] * 8)
STREAMS = bytes([0, 0, 0, 0, 0xA0, 0xA0, 0xD8, 0xFC])
CRC = struct.pack("<I", checksum.crc32c(DATA))


def segment(record=RECORD, crc=CRC, sizes=SIZES, streams=STREAMS, extra=b"", n_blocks=1):
    meta = record + crc + sizes + extra
    head = struct.pack("<IIQ", n_blocks, 20 + len(meta), len(streams))
    return with_crc(head + meta) + streams


SEGMENTS = {
    "unknown mode": segment(record=b"\x03" + RECORD[1:]),
    "first after last": segment(record=bytes([2, ord("d"), ord("a"), 0x21, 0x33])),
    "one symbol": segment(record=bytes([2, ord("a"), ord("a"), 0x01])),
    "code is not complete": segment(record=RECORD[:-1] + b"\x43"),
    "code is more than complete": segment(record=RECORD[:-1] + b"\x23"),
    "code of 13 bits": segment(record=RECORD[:-1] + b"\xd3"),
    "first length is zero": segment(record=bytes([2, ord("`"), ord("d"), 0x10, 0x32, 0x03])),
    "last length is zero": segment(record=bytes([2, ord("a"), ord("e"), 0x21, 0x33, 0x00])),
    "odd nibble is not zero": segment(record=bytes([2, ord("a"), ord("c"), 0x21, 0x12])),
    "record is cut off": with_crc(struct.pack("<IIQ", 1, 22, 0) + b"\x02a"),
    "directory too long": segment(extra=b"\0"),
    "directory too short": segment(sizes=SIZES[:-2]),
    "two blocks for one": segment(n_blocks=2),
    "stream lengths miss the payload": segment(streams=STREAMS + b"\0"),
    "stream too short": segment(sizes=struct.pack("<8H", 0, 2, *[1] * 6)),
    "stream too long": segment(sizes=struct.pack("<8H", 2, *[1] * 7), streams=b"\0" + STREAMS),
    "stream far too long": segment(
        sizes=struct.pack("<8H", *[1] * 7, 9), streams=STREAMS + bytes(8)
    ),
    "no streams": segment(sizes=bytes(16), streams=b""),
    "padding is not zero": segment(streams=b"\x01" + STREAMS[1:]),
    "other symbols": segment(streams=b"\x80" + STREAMS[1:]),
    "code runs past the payload": segment(streams=STREAMS[:-1] + b"\xff"),
    "checksum of the block": segment(crc=bytes(4)),
    "checksum of the tables": segment()[:24] + b"\0" + segment()[25:],
    "raw plane too short": segment(record=b"\0", sizes=b"", streams=DATA[:-1]),
    "payload of a constant plane": segment(b"\x01a", b"", b"", b"a"),
    "directory of a constant plane": segment(b"\x01a", CRC, b"", b""),
    "nothing follows": b"",
    "second segment": segment() + segment(),
}


def decode_segments(backend, segments):
    out = np.empty(len(DATA), np.uint8)
    backend.decode(segments + bytes(TAIL), len(segments), len(DATA), 1, 0, 16, out, 1)
    return out.tobytes()


def test_the_segment_that_the_lies_start_from(backend):
    assert decode_segments(backend, segment()) == DATA


@pytest.mark.parametrize("lie", SEGMENTS)
def test_segments_that_lie_with_right_checksums_are_found(backend, lie):
    with pytest.raises(Corrupt):
        decode_segments(backend, SEGMENTS[lie])
    header = Header("U8", (16,), 1, 0, 16, 16, checksum.crc32c(NAME.encode()))
    blob = header.pack() + SEGMENTS[lie] + bytes(TAIL)
    with pytest.raises(Corrupt, match=NAME):
        codec.decode(blob, NAME)
    with pytest.raises(Corrupt, match=NAME):
        stream(blob)


def test_errors_name_tensor_segment_and_block(backend):
    blob = bytearray(coded("huffman and raw"))
    blob[-TAIL - 1] ^= 0x10
    with pytest.raises(Corrupt, match=f"^{NAME}: segment 0, block 0: "):
        codec.decode(blob, NAME)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_rewritten_tables_never_give_other_bytes(backend, data):
    """Bytes before the payload are changed at will and their checksum is made right again."""
    header, segments = segments_of(coded("huffman and raw"))
    meta_bytes = struct.unpack_from("<I", segments, 4)[0]
    meta, payload = bytearray(segments[: meta_bytes - 4]), segments[meta_bytes:]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(meta) - 1))
        meta[at] = data.draw(st.integers(0, 255))
    blob = header.pack() + with_crc(bytes(meta)) + payload + bytes(TAIL)
    try:
        assert codec.decode(blob, NAME).tobytes() == WEIGHTS.tobytes()
    except Corrupt:
        assert blob != coded("huffman and raw")
