"""Packing is exact for every word, and both engines give the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codec import native, packed
from compress.codec.backends import VARIABLE
from compress.codec.packed import reference
from compress.errors import BadInput, Corrupt
from tests.codec.packed.matrices import SIZES, SPECIAL, degenerate, fibonacci, of_counts, trained

NATIVE = native.library()[0] is not None
ENGINES = ["native", "fallback"]


@pytest.fixture(params=packed.LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=packed.DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pack_everywhere(words: np.ndarray, dtype: str, layout: str) -> np.ndarray:
    """The blob, which every engine has made, checked and unpacked alike."""
    blobs = []
    for engine in ENGINES if NATIVE else ["fallback"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, engine)
            blobs.append(packed.pack(words, dtype, layout))
            told = packed.check(blobs[0])
            assert (told.layout, told.dtype, told.rows, told.cols) == (layout, dtype, *words.shape)
            assert told.nbytes == blobs[0].size
            assert np.array_equal(packed.unpack(blobs[0]), words)
    assert all(np.array_equal(blob, blobs[0]) for blob in blobs)
    return blobs[0]


def word_at(blob: bytes, row: int, col: int) -> int:
    """One word, found by the sentences of docs/PACKED.md alone."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(blob[at : at + size], "little")

    cols = number(12, 4)
    low, codes, index, table, extra = (number(at, 8) for at in range(24, 64, 8))
    groups, across = -(-cols // 16), -(-cols // 128)
    lane, tile = row % 32, row // 32 * across + col // 128
    group = (row // 32 * groups + col // 16) * 32 + lane
    low_byte = blob[low + group * 16 + col % 16]
    first, end = number(index + 4 * tile, 4), number(index + 4 * tile + 4, 4)
    if blob[6] == 1:
        rank = blob[codes + group * 8 + col % 16 // 2] >> 4 * (col % 2) & 15
        if rank < 15:
            return blob[table + rank] << 8 | low_byte
        listed = (number(extra + 4 * i, 4) for i in range(first, end))
        return next(e & 0xFFFF for e in listed if e >> 16 == lane << 7 | col % 128)
    lengths = blob[extra + tile * 32 : extra + tile * 32 + 32]
    stream = number(codes + 16 * first + sum(lengths[:lane]), lengths[lane])
    entry = 0
    for _ in range(col % 128 + 1):
        entry = number(table + 2 * (stream & 4095), 2)
        stream >>= entry & 255
    turned = entry & 0xFF00 | low_byte
    return turned >> 1 | (turned & 1) << 15


def test_a_blob_means_what_the_text_says(layout: str) -> None:
    words = trained((33, 150))
    words[::7, ::11] = np.random.default_rng(1).integers(0, 65536, words[::7, ::11].shape)
    blob = packed.pack(words, "BF16", layout).tobytes()
    found = [[word_at(blob, row, col) for col in range(150)] for row in range(33)]
    assert found == words.tolist()


def test_every_word(layout: str, dtype: str) -> None:
    words = np.random.default_rng(0).permutation(65536).astype(np.uint16).reshape(512, 128)
    pack_everywhere(words, dtype, layout)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_odd_sizes(shape: tuple[int, int], layout: str, dtype: str) -> None:
    pack_everywhere(trained(shape, dtype), dtype, layout)


@pytest.mark.parametrize("name", degenerate("fast"))
def test_degenerate_tables(name: str, layout: str, dtype: str) -> None:
    pack_everywhere(degenerate(layout)[name], dtype, layout)


def test_special_values(layout: str, dtype: str) -> None:
    words = trained((40, 200), dtype)
    at = np.random.default_rng(2).integers(0, words.size, 50 * SPECIAL.size)
    words.flat[at] = np.tile(SPECIAL, 50)
    pack_everywhere(words, dtype, layout)
    pack_everywhere(np.resize(SPECIAL, (37, 19)), dtype, layout)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 300)),
    symbols=st.integers(1, 65536),
    layout=st.sampled_from(packed.LAYOUTS),
    seed=st.integers(0, 99),
)
def test_round_trips(shape: tuple[int, int], symbols: int, layout: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    alphabet = random.integers(0, 65536, symbols, dtype=np.uint16)
    skewed = (symbols * random.random(shape) ** 3).astype(int)
    pack_everywhere(alphabet[skewed], "BF16", layout)


def test_one_symbol_takes_no_bits() -> None:
    layout = packed.check(packed.pack(degenerate("dense")["one symbol"], "BF16", "dense"))
    assert layout.nbytes == layout.codes + 16


def test_codes_have_at_most_twelve_bits() -> None:
    made = packed.tables(fibonacci(20) + [0] * 236, "dense")
    lengths = made.code >> 16
    assert lengths.max() == 12
    assert (2.0 ** -lengths[:20].astype(float)).sum() == 1


def test_the_most_frequent_have_ranks_and_of_equals_the_smaller() -> None:
    counts = [0] * 256
    for symbol in range(20, 40):
        counts[symbol] = 7
    counts[3], counts[200] = 1, 9
    made = packed.tables(counts, "fast")
    assert made.table.tolist() == [200, *range(20, 34), 0]
    assert made.code[200] == 0
    assert made.code[33] == 14
    assert made.code[[34, 3, 0]].tolist() == [15] * 3


@pytest.mark.parametrize(
    ("layout", "dtype", "least", "most"),
    [
        ("fast", "BF16", 12.0, 12.05),
        ("dense", "BF16", 10.6, 10.85),
        ("fast", "F16", 16, 44),
        ("dense", "F16", 13, 13.8),
    ],
)
def test_bits_a_weight(layout: str, dtype: str, least: float, most: float) -> None:
    """Two bits of the mantissa are in the high byte of fp16: too many for 15 ranks."""
    words = trained((512, 1024), dtype)
    told = packed.check(packed.pack(words, dtype, layout))
    assert least < 8 * told.nbytes / words.size < most
    assert told.words_nbytes == words.nbytes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(32, 33), slice(64, 100), slice(32, 96)], ids=str
)
def test_ranges_of_rows(
    engine: str, rows: slice, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "native" and not NATIVE:
        pytest.skip("no native library")
    monkeypatch.setenv(VARIABLE, engine)
    words = of_counts([3000, 2000, 400] + [100] * 30, layout, 90)
    blob = packed.pack(words, "F16", layout)
    assert np.array_equal(packed.unpack(blob, rows), words[rows])
    assert packed.unpack(blob, slice(32, 32)).shape == (0, 90)
    assert np.array_equal(packed.unpack(blob, slice(64, None)), words[64:])


def test_rows_begin_with_a_tile(layout: str) -> None:
    blob = packed.pack(trained((64, 64)), "BF16", layout)
    for rows in (slice(1, 40), slice(0, 64, 2)):
        with pytest.raises(ValueError, match="multiple of 32"):
            packed.unpack(blob, rows)


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_threads_change_nothing(layout: str) -> None:
    words = trained((400, 333))
    blobs = [packed.pack(words, "BF16", layout, threads=threads) for threads in (1, 2, 7)]
    assert all(np.array_equal(blob, blobs[0]) for blob in blobs)
    for threads in (1, 2, 7):
        assert np.array_equal(packed.unpack(blobs[0], threads=threads), words)


def test_a_matrix_in_strips_is_compared_whole(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.codec.packed.api._RUN", 4096)
    pack_everywhere(trained((170, 70)), "BF16", layout)


def test_what_does_not_unpack_again_is_not_given_out(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = reference.write

    def faulty(words, blob, told, code, threads):  # type: ignore[no-untyped-def]
        write(words, blob, told, code, threads)
        blob[told.low + 5] ^= 4

    monkeypatch.setenv(VARIABLE, "fallback")
    monkeypatch.setattr(reference, "write", faulty)
    with pytest.raises(Corrupt, match="layers.0: does not unpack to what was packed"):
        packed.pack(trained((5, 40)), "BF16", layout, where="layers.0")


def test_what_cannot_be_packed() -> None:
    words = trained((4, 4))
    with pytest.raises(BadInput, match="w: unknown layout 'fats' .* did you mean 'fast'"):
        packed.pack(words, "BF16", "fats", where="w")
    with pytest.raises(BadInput, match="16-bit floats .* got F32"):
        packed.pack(words, "F32", "fast")
    for empty in (words[:0], words[:, :0].copy()):
        with pytest.raises(BadInput, match="empty matrix"):
            packed.pack(empty, "BF16", "dense")
    for wrong in (words[0], words.view(np.int16), words[:, ::2]):
        with pytest.raises(ValueError, match="C-contiguous"):
            packed.pack(wrong, "BF16", "fast")
