"""The oracle and the encoder's decisions against bytes and values derived by hand."""

from __future__ import annotations

import heapq
import itertools
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codec import checksum, huffman, reference
from compress.codec.segment import CONSTANT, HUFFMAN, RAW


def crc(data):
    """CRC-32C bit by bit, straight from its definition."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 * (value & 1)
    return struct.pack("<I", value ^ 0xFFFFFFFF)


def header(name, width, rotate, dtype, words, shape):
    body = b"EPTR" + bytes([1, 1, width, rotate, 16, len(shape), 0, 0]) + crc(name)
    body += dtype.ljust(16, b"\0") + struct.pack(f"<Q{len(shape)}Q", words, *shape)
    return body + crc(body)


def segment(n_blocks, records_and_directory, payload):
    meta_bytes = 16 + len(records_and_directory) + 4
    meta = struct.pack("<IIQ", n_blocks, meta_bytes, len(payload)) + records_and_directory
    return meta + crc(meta) + payload


def test_crc_of_the_specification():
    assert checksum.crc32c(b"123456789") == 0xE3069283
    assert struct.pack("<I", checksum.crc32c(b"hello")) == crc(b"hello")


def test_constant_tensor_byte_by_byte():
    expected = header(b"bias", 1, 0, b"U8", 5, [5]) + segment(1, b"\x01\x07", b"") + bytes(8)
    assert reference.encode_tensor("bias", "U8", (5,), b"\x07" * 5) == expected
    assert reference.decode_tensor(expected, "bias") == b"\x07" * 5


def test_huffman_tensor_byte_by_byte():
    # Counts 4:2:1:1 give lengths 1, 2, 3, 3 and codes 0, 10, 110, 111; 32 symbols a stream.
    data = b"a" * 128 + b"b" * 64 + b"c" * 32 + b"d" * 32
    record = bytes([2, ord("a"), ord("d"), 0x21, 0x33])
    directory = crc(data) + struct.pack("<8H", 4, 4, 4, 4, 8, 8, 12, 12)
    streams = bytes(16) + bytes([0b10101010]) * 16 + bytes([0b11011011, 0b01101101, 0b10110110]) * 4
    streams += b"\xff" * 12
    expected = header(b"w", 1, 0, b"I8", 256, [16, 16]) + segment(1, record + directory, streams)
    expected += bytes(8)
    assert reference.encode_tensor("w", "I8", (16, 16), data) == expected
    assert reference.decode_tensor(expected, "w") == data


def test_rotation_moves_the_sign_to_bit_zero():
    # bf16 -1.0 is BF80; rotated left by one bit 7F01; so plane 0 is 01 and plane 1 is 7F.
    expected = header(b"w", 2, 1, b"BF16", 1, []) + segment(1, b"\x01\x01\x01\x7f", b"") + bytes(8)
    assert reference.encode_tensor("w", "BF16", (), b"\x80\xbf") == expected


def test_empty_tensor_has_no_segments():
    expected = header(b"w", 4, 1, b"F32", 0, [0]) + bytes(8)
    assert reference.encode_tensor("w", "F32", (0,), b"") == expected


@given(st.integers(1, 1 << 20))
def test_fixed_point_logarithm(x):
    assert huffman.log2_fixed(x) in (
        math.floor(256 * math.log2(x)),
        math.floor(256 * math.log2(x)) - 1,
    )


@pytest.mark.parametrize(("x", "value"), [(1, 0), (2, 256), (3, 405), (5, 594), (1 << 20, 5120)])
def test_fixed_point_logarithm_values(x, value):
    assert huffman.log2_fixed(x) == value


def cost(counts, lengths):
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


def huffman_cost(counts):
    """The cost of an unlimited Huffman code, by merging the two least weights."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        total += pair
        heapq.heappush(heap, pair)
    return total


counts_of_symbols = st.dictionaries(st.integers(0, 255), st.integers(1, 9), min_size=2).map(
    lambda found: [found.get(symbol, 0) for symbol in range(256)]
)


@settings(deadline=None, max_examples=60)
@given(counts_of_symbols)
def test_code_lengths_are_complete_and_optimal(counts):
    lengths = huffman.code_lengths(counts)
    assert sum(4096 >> length for length in lengths if length) == 4096
    assert [bool(length) for length in lengths] == [bool(count) for count in counts]
    # So few occurrences cannot make a Huffman code of more than 12 bits.
    assert cost(counts, lengths) == huffman_cost(counts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6))
def test_limited_code_lengths_are_optimal(few):
    counts = few + [0] * (256 - len(few))
    choices = itertools.product(range(1, 4), repeat=len(few))
    best = min(
        cost(few, lengths) for lengths in choices if sum(8 >> length for length in lengths) <= 8
    )
    assert cost(counts, huffman.code_lengths(counts, limit=3)) == best


def test_code_lengths_stay_within_the_limit():
    fibonacci = [1, 1]
    while len(fibonacci) < 24:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    lengths = huffman.code_lengths(fibonacci + [0] * 232)
    assert max(lengths) == 12
    assert sum(4096 >> length for length in lengths if length) == 4096


def test_equal_counts_break_ties_by_symbol():
    assert huffman.code_lengths([5, 5, 5] + [0] * 253)[:3] == (2, 2, 1)
    assert huffman.canonical_codes([2, 2, 1] + [0] * 253)[:3] == [0b10, 0b11, 0b0]


def test_plane_modes():
    def mode(counts, n_blocks=1):
        return huffman.plan_plane(counts + [0] * (256 - len(counts)), n_blocks).mode

    assert mode([0, 9]) == CONSTANT
    assert mode([1] * 256) == RAW
    # Three bytes of codes, four of table and sixteen of stream lengths are worth it from 24 on.
    assert mode([12, 12]) == HUFFMAN
    assert mode([12, 11]) == RAW
    assert mode([12, 12], n_blocks=2) == RAW


def blocks_of(*symbols):
    """One plane, blocks of two equally frequent symbols each."""
    return [
        [[32768 * (symbol in pair) for symbol in range(256)]]
        for pair in (({s, s + 1}) for s in symbols)
    ]


@pytest.mark.parametrize(
    ("symbols", "size"),
    [
        ([0] * 16, 16),
        ([0] * 4 + [2] * 4 + [4] * 4 + [6] * 4, 4),
        (range(0, 32, 2), 1),
        ([0, 0, 0, 0, 2], 4),
        ([0], 16),
        ([0, 2], 1),
    ],
)
def test_segments_follow_the_statistics(symbols, size):
    assert huffman.segment_blocks(blocks_of(*symbols)) == size
