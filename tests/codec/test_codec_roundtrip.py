"""Whatever the bytes, the public functions give them back, and say how large they will be."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress import codec
from compress.errors import BadInput, Corrupt

DTYPES = ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"]
DTYPES += ["I16", "U16", "I32", "U32", "I64", "U64", "C64", "F8_E8M0"]
relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def coded(dtype, shape, data, name="w", chunks=None):
    return b"".join(codec.encode(name, dtype, shape, [data] if chunks is None else chunks))


def check_round_trip(dtype, shape, data):
    blob = coded(dtype, shape, data)
    header = codec.read_header(blob[: codec.HEADER_MAX], "w")
    assert (header.dtype, header.shape, header.nbytes) == (dtype, tuple(shape), len(data))
    assert codec.decode(blob, "w").tobytes() == data
    pieces = codec.decode_stream(io.BytesIO(blob).read, len(blob), "w")
    assert b"".join(piece.tobytes() for piece in pieces) == data
    assert codec.predict(dtype, [data], shape) == len(blob)
    begin, end = header.words // 3, header.words - header.words // 4
    part = codec.decode_part(blob, begin, end, "w").tobytes()
    assert part == data[begin * header.width : end * header.width]
    return blob


skewed = st.lists(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 127, 128, 255]), max_size=700).map(bytes)


@relaxed
@given(st.sampled_from(DTYPES), st.one_of(st.binary(max_size=700), skewed))
def test_any_bytes_of_any_dtype(backend, dtype, data):
    size = codec.dtype_bits(dtype) // 8
    data = data[: len(data) // size * size]
    check_round_trip(dtype, (len(data) // size,), data)


@pytest.mark.parametrize(
    ("dtype", "form"), [("F16", "<H"), ("BF16", "<H"), ("F32", "<I"), ("F64", "<Q")]
)
def test_special_floats_keep_every_bit(backend, dtype, form):
    bits = 8 * struct.calcsize(form)
    exponent = {"F16": 5, "BF16": 8, "F32": 8, "F64": 11}[dtype]
    top = (1 << exponent) - 1 << bits - 1 - exponent
    sign = 1 << bits - 1
    # ±0, the smallest denormals, ±Inf, quiet and signalling NaNs with payloads of both signs.
    values = [
        0,
        sign,
        1,
        sign | 1,
        top,
        sign | top,
        top | 1,
        sign | top | 5,
        sign - 1,
        2 * sign - 1,
    ]
    data = b"".join(struct.pack(form, value) for value in values * 7)
    check_round_trip(dtype, (7, 10), data)


@pytest.mark.parametrize("words", [0, 1, 2, 7, 8, 9, 15, 16, 17, 63, 65])
@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32", "I64"])
def test_small_and_odd_sizes(backend, dtype, words):
    size = codec.dtype_bits(dtype) // 8
    data = bytes(i % 3 for i in range(words * size))
    check_round_trip(dtype, (words,), data)


@pytest.mark.parametrize("words", [65535, 65536, 65537, 131072, 131081])
def test_block_boundaries(backend, words):
    data = bytes(np.random.default_rng(0).binomial(6, 0.3, words).astype(np.uint8))
    check_round_trip("U8", (words,), data)


@pytest.mark.parametrize("words", [1 << 20, (1 << 20) + 1, (1 << 20) - 1])
def test_group_boundaries(fast_backend, words):
    rng = np.random.default_rng(0)
    data = (rng.standard_normal(words, np.float32) * 0.02).view(np.uint32) >> 16
    check_round_trip("BF16", (words,), data.astype("<u2").tobytes())


def test_shapes(backend):
    check_round_trip("F32", (), struct.pack("<f", 1.5))
    check_round_trip("BF16", (3, 0, 5), b"")
    check_round_trip("U8", (1, 2, 1, 2, 1, 2, 1, 2), bytes(range(16)))
    check_round_trip("F4", (3, 2), b"\x12\x34\x56")
    check_round_trip("F6_E2M3", (4,), b"\x12\x34\x56")


@relaxed
@given(st.lists(st.integers(0, 400), max_size=12))
def test_chunk_sizes_do_not_matter(backend, sizes):
    data = bytes(i * i % 11 for i in range(2 * sum(sizes)))
    chunks, at = [], 0
    for size in sizes:
        chunks += [memoryview(data)[at : at + size], bytearray(data[at + size : at + 2 * size])]
        at += 2 * size
    shape = (sum(sizes),)
    assert coded("BF16", shape, None, chunks=chunks) == coded("BF16", shape, data)
    assert codec.predict("BF16", chunks, shape) == codec.predict("BF16", [data], shape)


def test_many_runs_give_the_same_bytes_as_one(fast_backend, monkeypatch):
    data = np.random.default_rng(0).binomial(20, 0.5, 5 << 20).astype(np.uint8)
    whole = coded("U8", data.shape, data)
    monkeypatch.setattr("compress.codec.api._RUN", 1 << 20)
    pieces = [data[: 3 << 19], data[3 << 19 : 7 << 19], data[7 << 19 :]]
    assert coded("U8", data.shape, None, chunks=pieces) == whole
    parts = list(codec.decode_stream(io.BytesIO(whole).read, len(whole)))
    assert [part.size for part in parts] == [1 << 20] * 5
    assert np.array_equal(np.concatenate(parts), data)


def test_decode_into_the_callers_array(backend):
    blob = coded("U8", (6,), b"abcdef")
    out = np.zeros(6, np.uint8)
    assert codec.decode(blob, out=out) is out
    assert out.tobytes() == b"abcdef"
    read_only = np.zeros(6, np.uint8)
    read_only.flags.writeable = False
    for wrong in (np.zeros(7, np.uint8), np.zeros(12, np.uint8)[::2], read_only):
        with pytest.raises(ValueError, match="writable contiguous uint8 of shape"):
            codec.decode(blob, out=wrong)


def test_the_stored_shape_never_equals_the_original(backend):
    shapes_met = 0
    for count in range(60, 120):
        blob = check_round_trip("U8", (count,), bytes(count))
        assert len(blob) != count
        shapes_met += len(check_round_trip("U8", (count, 1), bytes(count))) == count + 8
    assert shapes_met == 1


def test_constant_tensors_cost_a_few_bytes(fast_backend):
    assert len(coded("BF16", (1 << 20,), b"\x80\x3f" * (1 << 20))) < 100


def test_random_bytes_stay_raw(backend):
    data = np.random.default_rng(0).integers(0, 256, 70000, np.uint8).tobytes()
    assert len(coded("U8", (70000,), data)) < 70000 + 100


@pytest.mark.parametrize("given_bytes", [0, 7, 9, 1000])
def test_wrong_number_of_bytes(backend, given_bytes):
    with pytest.raises(BadInput, match="w: the bytes given disagree"):
        coded("BF16", (4,), bytes(given_bytes))


def test_what_the_format_cannot_hold():
    with pytest.raises(BadInput, match="did you mean 'BF16'"):
        codec.encode("w", "BF15", (1,), [b"ab"])
    with pytest.raises(BadInput, match="w: too many dimensions, got 9, expected at most 8"):
        codec.encode("w", "U8", (1,) * 9, [b"a"])
    with pytest.raises(BadInput, match="do not fill whole bytes"):
        codec.encode("w", "F4", (3,), [b"ab"])


def test_a_part_needs_the_segments_that_hold_it_and_no_others(fast_backend):
    words = np.random.default_rng(0).integers(0, 1 << 14, 5 << 19, dtype=np.uint16)
    blob = bytearray(coded("U16", words.shape, words.tobytes()))
    third = 1 << 20  # words of a segment
    for begin, end in (
        (0, 1),
        (third - 1, third + 1),
        (third, 2 * third),
        (words.size, words.size),
    ):
        part = codec.decode_part(blob, begin, end).view("<u2")
        assert np.array_equal(part, words[begin:end])
    blob[len(blob) // 10] ^= 1
    last = codec.decode_part(blob, 2 * third, words.size).view("<u2")
    assert np.array_equal(last, words[2 * third :])
    with pytest.raises(Corrupt):
        codec.decode_part(blob, third - 1, third + 1)
    with pytest.raises(Corrupt):
        codec.decode_part(blob[: len(blob) - 9], 0, words.size)
    with pytest.raises(ValueError, match="words"):
        codec.decode_part(blob, 0, words.size + 1)
