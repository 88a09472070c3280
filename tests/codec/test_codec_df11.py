"""DFloat11 units: both decoders against plain Python, and against what contradicts itself."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codec import backend
from compress.codec.df11 import Unit, decode_unit
from compress.errors import Corrupt

END = 999  # the encoder's own symbol for the end, which no weight has
BLOCK = 4096


def huffman(symbols: list[int]) -> dict[int, int]:
    """Code lengths of an optimal code for the symbols and one `END`."""
    order = itertools.count()
    heap = [(count, next(order), {s: 0}) for s, count in Counter(symbols).items()]
    heap.append((1, next(order), {END: 0}))
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        deeper = {s: length + 1 for s, length in (left | right).items()}
        heapq.heappush(heap, (a + b, next(order), deeper))
    return heap[0][2]


def canonical(lengths: dict[int, int]) -> dict[int, str]:
    codes, code, last = {}, 0, 0
    for symbol, length in sorted(lengths.items(), key=lambda item: item[::-1]):
        code <<= length - last
        codes[symbol], code, last = f"{code:0{length}b}", code + 1, length
    return codes


def tables(codes: dict[int, str]) -> np.ndarray:
    """``luts`` as dfloat11 fills them: what no symbol owns repeats the value before it."""
    prefixes = {code[: (len(code) - 1) // 8 * 8] for s, code in codes.items() if s != END}
    prefixes = sorted(prefixes | {""}, key=lambda prefix: (len(prefix), prefix))
    rows, value = [], 0
    for prefix in prefixes:
        row = []
        for byte in range(256):
            path = prefix + f"{byte:08b}"
            if path in prefixes:
                value = 256 - prefixes.index(path)
            else:
                found = [s for s, c in codes.items() if path.startswith(c) and len(c) > len(prefix)]
                value = found[0] if found and found[0] != END else value
            row.append(value)
        rows.append(row)
    rows.append([len(codes.get(symbol, "")) for symbol in range(256)])
    return np.array(rows, np.uint8)


def encode(symbols: list[int], codes: dict[int, str]) -> Unit:
    """As dfloat11 does, its gaps and positions written only where a code begins."""
    gaps, positions, at, parts = [], [], 0, []
    padding = sum(len(codes[s]) for s in symbols) % 8
    for i, symbol in enumerate([*symbols, END] if padding else symbols):
        if at // 64 == len(gaps):
            gaps.append(at % 64)
        if at // (8 * BLOCK) == len(positions):
            positions.append(i)
        parts.append(codes[symbol])
        at += len(codes[symbol])
    total = sum(len(codes[s]) for s in symbols)
    stream = "".join(parts).ljust(total + 8, "0")[: -(-total // 8) * 8]
    nbytes = len(stream) // 8
    gaps += [0] * (-(-nbytes // BLOCK) * 512 - len(gaps))
    return Unit(
        luts=tables(codes),
        codes=np.packbits(np.array(list(stream), np.uint8)),
        sign_mantissa=np.random.default_rng(0).integers(0, 256, len(symbols), np.uint8),
        positions=np.array([*positions, len(symbols)], np.uint32),
        gaps=np.packbits(np.array([int(bit) for gap in gaps for bit in f"{gap:05b}"], np.uint8)),
    )


def plainly(unit: Unit) -> list[int]:
    """The words of a valid unit, from its tables and stream alone."""
    stream = int.from_bytes(unit.codes.tobytes(), "big") << 32
    length = 8 * unit.codes.size + 32
    lengths, at, words = unit.luts[-1], 0, []
    for other in unit.sign_mantissa.tolist():
        window = stream >> (length - at - 32) & 0xFFFFFFFF
        row = 0
        for shift in (24, 16, 8, 0):
            value = int(unit.luts[row, window >> shift & 255])
            if value < 240:
                break
            row = 256 - value
        at += int(lengths[value])
        words.append((other & 0x80) << 8 | value << 7 | other & 0x7F)
    return words


def weights(symbols: list[int], unit: Unit) -> list[int]:
    rest = unit.sign_mantissa.tolist()
    return [(r & 128) << 8 | s << 7 | r & 127 for s, r in zip(symbols, rest, strict=True)]


@pytest.fixture(params=["native", "fallback"])
def decoder(request, monkeypatch):
    if request.param == "native" and not backend().startswith("native"):
        pytest.skip("no compiler")
    monkeypatch.setenv("ENTROPRESS_BACKEND", request.param)
    return request.param


def outcomes(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> list[bytes | str]:
    """What each decoder says."""
    found: list[bytes | str] = []
    for name in ("native", "fallback"):
        monkeypatch.setenv("ENTROPRESS_BACKEND", name)
        try:
            found.append(decode_unit(unit, "here").tobytes())
        except Corrupt as error:
            found.append(str(error))
    return found


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_was_coded_comes_back(data):
    with pytest.MonkeyPatch.context() as patch:
        alphabet = data.draw(st.lists(st.integers(0, 239), min_size=1, max_size=40, unique=True))
        rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
        odds = rng.random(len(alphabet)) ** data.draw(st.integers(1, 40))
        size = data.draw(st.integers(1, 30_000))
        symbols = rng.choice(alphabet, size, p=odds / odds.sum()).tolist()
        unit = encode(symbols, canonical(huffman(symbols)))
        expected = np.array(plainly(unit), np.uint16)
        assert expected.tolist() == weights(symbols, unit)
        for found in outcomes(unit, patch) if backend().startswith("native") else ():
            assert found == expected.tobytes()


def test_codes_of_every_length(decoder):
    symbols = [*range(32), *range(31, -1, -1)] * 40
    unit = encode(symbols, canonical({**{s: s + 1 for s in range(32)}, END: 32}))
    assert len(unit.luts) == 5
    assert decode_unit(unit, "here").tolist() == weights(symbols, unit) == plainly(unit)


def test_a_last_block_that_only_ends_a_code(decoder):
    # 8 bits and 2,048 times 16: the last code begins in one block of 32,768 bits, ends in another.
    lengths = {0: 8, 1: 16, 2: 16, END: 15} | {s: s for s in range(3, 8)} | {8: 1, 9: 2}
    symbols = [0] + [1, 2] * 1024
    unit = encode(symbols, canonical(lengths))
    assert unit.positions.tolist() == [0, len(symbols)]
    assert unit.codes.size == BLOCK + 1
    assert decode_unit(unit, "here").tolist() == weights(symbols, unit)


@pytest.fixture(scope="module")
def small() -> Unit:
    rng = np.random.default_rng(3)
    symbols = (120 - rng.geometric(0.3, 14_000)).tolist()
    return encode(symbols, canonical(huffman(symbols)))


def test_a_changed_table_is_found_or_of_no_account(small, decoder):
    sound = decode_unit(small, "here")
    found = 0
    for row, byte in itertools.product(range(len(small.luts)), range(256)):
        luts = small.luts.copy()
        luts[row, byte] ^= 1 << (row + byte) % 8
        try:
            assert (decode_unit(replace(small, luts=luts), "here") == sound).all()
        except Corrupt as error:
            found += 1
            assert str(error).startswith("here: ")
    assert found > 256


@pytest.mark.parametrize("part", ["codes", "gaps", "positions"])
def test_decoders_agree_on_damage(small, part, monkeypatch):
    if not backend().startswith("native"):
        pytest.skip("no compiler")
    rng, found = np.random.default_rng(7), 0
    for _ in range(40):
        data = getattr(small, part).copy()
        data.view(np.uint8)[rng.integers(data.nbytes)] ^= 1 << rng.integers(8)
        first, second = outcomes(replace(small, **{part: data}), monkeypatch)
        assert first == second
        found += isinstance(first, str)
    # A code may become another of the same length, and gaps of windows past the end mean nothing.
    assert found > (35 if part == "positions" else 8)


@pytest.mark.parametrize("part", [field.name for field in fields(Unit)])
@pytest.mark.parametrize("left", [0, 1, -1])
def test_truncated(small, part, left, decoder):
    damaged = replace(small, **{part: getattr(small, part)[:left]})
    with pytest.raises(Corrupt, match="here: "):
        decode_unit(damaged, "here")


def test_positions_must_not_run_backwards(small, decoder):
    positions = small.positions.copy()
    positions[1] = positions[-1] + 1
    with pytest.raises(Corrupt, match="do not count up to the number of weights"):
        decode_unit(replace(small, positions=positions), "here")
