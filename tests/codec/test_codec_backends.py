"""Backends give the same bytes as the reference and read what it writes, small blocks included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.codec import reference
from compress.codec.format import TAIL
from compress.codec.segment import parse_head

rng = np.random.default_rng(0)
LAYOUTS = [(width, rotate) for width in (1, 2, 4, 8) for rotate in (0, 1)]


def array(data):
    return np.frombuffer(bytes(data), np.uint8)


def decode(backend, segments, words, width, rotate, block_log2=16):
    out = np.full(words * width, 0xA5, np.uint8)
    backend.decode(segments + bytes(TAIL), len(segments), words, width, rotate, block_log2, out, 2)
    return out.tobytes()


def check_same_bytes(backend, data, width, rotate):
    segments = reference.encode(data, width, rotate)
    assert bytes(backend.encode(array(data), width, rotate, 2)) == segments
    assert backend.predict(array(data), width, rotate, 2) == len(segments)
    assert decode(backend, segments, len(data) // width, width, rotate) == data


def fibonacci():
    """Counts whose Huffman code would be 20 bits long."""
    counts = [1, 1]
    while len(counts) < 21:
        counts.append(counts[-1] + counts[-2])
    return rng.permutation(np.repeat(np.arange(21, dtype=np.uint8) * 12, counts)).tobytes()


TABLES = {
    "two symbols": rng.choice(np.array([3, 200], np.uint8), 9000).tobytes(),
    "first and last symbol": bytes([0] * 4000 + [255] * 5),
    "all symbols equally often": bytes(range(256)) * 40,
    "symbols with gaps": bytes(range(0, 256, 3)) * 50,
    "code beyond 12 bits": fibonacci(),
    "sorted": bytes(sorted(rng.binomial(40, 0.5, 30000).astype(np.uint8))),
    "one rare symbol": bytes(66000) + b"\x01",
    "random": rng.bytes(20000),
    "gaussian": (rng.standard_normal(20000) * 0.02).astype("<f4").tobytes(),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("width", "rotate"), [(1, 0), (2, 1), (4, 1), (8, 0)])
def test_tables(fast_backend, table, width, rotate):
    data = TABLES[table]
    check_same_bytes(fast_backend, data[: len(data) // width * width], width, rotate)


words = st.integers(0, 260)
alphabets = st.lists(st.integers(0, 255), min_size=1, max_size=20)


@st.composite
def payloads(draw):
    width, rotate = draw(st.sampled_from(LAYOUTS))
    size = draw(words) * width
    symbols, seed = draw(alphabets), draw(st.integers(0, 1 << 30))
    local = np.random.default_rng(seed)
    return bytes(local.choice(np.array(symbols, np.uint8), size)), width, rotate


quiet = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quiet
@given(payloads())
def test_same_bytes_as_the_reference(fast_backend, payload):
    check_same_bytes(fast_backend, *payload)


@quiet
@given(payloads(), st.integers(3, 9))
def test_small_blocks_are_read(fast_backend, payload, block_log2):
    data, width, rotate = payload
    segments = reference.encode(data, width, rotate, block_log2)
    words = len(data) // width
    assert reference.decode(segments, words, width, rotate, block_log2) == data
    assert decode(fast_backend, segments, words, width, rotate, block_log2) == data


def test_large_blocks_are_read(fast_backend):
    data = bytes(rng.binomial(9, 0.4, 600_000).astype(np.uint8))
    segments = reference.encode(data, 1, 0, 18)
    assert decode(fast_backend, segments, len(data), 1, 0, 18) == data


def blocks_of(numbers):
    """Blocks of 65536 words; each number has four symbols of its own."""
    choices = [4 * number + rng.integers(0, 4, 1 << 16) for number in numbers]
    return np.concatenate(choices).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("numbers", "sizes"),
    [
        ([0] * 17, [16, 1]),
        (range(16), [1] * 16),
        (sorted([*range(4)] * 4), [4, 4, 4, 4]),
        ([0, 0, 0, 0, 1, 1], [4, 2]),
        ([0, 0, 0, 0, 0], [5]),
    ],
)
def test_segments_follow_the_statistics(fast_backend, numbers, sizes):
    data = blocks_of(numbers)
    segments = bytes(fast_backend.encode(array(data), 1, 0, 2))
    found, at, left = [], 0, len(data)
    while left:
        head = parse_head(segments[at : at + 16], left, 1, 16)
        found.append(head.n_blocks)
        at += head.size
        left -= head.words
    assert found == sizes
    assert fast_backend.predict(array(data), 1, 0, 2) == len(segments)
    assert decode(fast_backend, segments, len(data), 1, 0) == data


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[0] * 17, range(16), [0, 0, 0, 0, 1, 1]])
def test_whole_groups_have_the_same_bytes_as_the_reference(fast_backend, numbers):
    check_same_bytes(fast_backend, blocks_of(numbers), 1, 0)


@pytest.mark.slow
def test_a_group_of_bf16_has_the_same_bytes_as_the_reference(fast_backend):
    words = (rng.standard_normal(1 << 20).astype("<f4") * 0.02).view("<u4") >> 16
    check_same_bytes(fast_backend, words.astype("<u2").tobytes(), 2, 1)


@quiet
@given(st.binary(max_size=3000))
def test_crc32c(fast_backend, data):
    assert fast_backend.crc32c(data) == reference.crc32c(data)
