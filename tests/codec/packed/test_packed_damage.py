"""Damaged packed weights are found before anything is launched, and never crash the decoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codec import native
from compress.codec.backends import VARIABLE
from compress.codec.packed import LAYOUTS, Layout, check, pack, parse, seal, unpack
from compress.errors import BadInput, Corrupt
from tests.codec.packed.matrices import of_counts, trained

ENGINES = ["fallback"] + ["native"] * (native.library()[0] is not None)
Harm = Callable[[np.ndarray, Layout], None]


def small(layout: str) -> np.ndarray:
    """A blob of four tiles, with rows, columns and ranks of padding and with escapes."""
    words = trained((33, 131))
    words[::9, ::13] = np.random.default_rng(1).integers(0, 65536, words[::9, ::13].shape)
    return pack(words, "BF16", layout)


BLOBS = {layout: small(layout) for layout in LAYOUTS}


def verdict(blob: np.ndarray) -> str:
    try:
        check(blob)
    except Corrupt as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flipped_bits_are_found(layout: str) -> None:
    blob = BLOBS[layout].copy()
    for bit in (*range(8 * 160), *range(8 * 160, 8 * blob.size, 41)):
        blob[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Corrupt, BadInput)):
            check(blob)
        blob[bit // 8] ^= 1 << bit % 8
    check(blob)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncations_are_found(layout: str) -> None:
    blob = BLOBS[layout]
    for size in (*range(0, blob.size, 41), blob.size - 16, blob.size - 1):
        with pytest.raises(Corrupt):
            check(blob[:size])
        with pytest.raises(Corrupt):
            unpack(blob[:size])
    with pytest.raises(Corrupt, match=rf"got {blob.size + 16}, expected {blob.size}"):
        check(np.concatenate((blob, np.zeros(16, np.uint8))))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_what_a_right_checksum_hides_is_found_or_harmless(data: st.DataObject, layout: str) -> None:
    blob = BLOBS[layout].copy()
    told = parse(blob[:128].tobytes())
    sections = [(told.index, told.low), (told.table, told.index), (told.low, blob.size)]
    for _ in range(data.draw(st.integers(1, 3))):
        begin, end = data.draw(st.sampled_from(sections))
        blob[data.draw(st.integers(begin, end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    seal(blob, told)
    verdicts, words = [], []
    for engine in ENGINES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(VARIABLE, engine)
            verdicts.append(bool(verdict(blob)))
            try:
                words.append(unpack(blob).tobytes())
            except Corrupt:
                words.append(None)
                assert verdicts[-1]
    assert len(set(verdicts)) == 1
    if not verdicts[0]:
        assert len(set(words)) == 1


def _add(section: str, at: int, amount: int) -> Harm:
    def harm(blob: np.ndarray, told: Layout) -> None:
        blob[getattr(told, section) + at] += amount

    return harm


def _set(section: str, at: int, value: int) -> Harm:
    def harm(blob: np.ndarray, told: Layout) -> None:
        blob[getattr(told, section) + at] = value

    return harm


def _swap_escapes(blob: np.ndarray, told: Layout) -> None:
    pair = blob[told.extra : told.extra + 8].view("<u4")
    pair[:] = pair[::-1].copy()


def _swap_index(blob: np.ndarray, told: Layout) -> None:
    index = told.index_of(blob)
    index[1:3] = index[2:0:-1].copy()


def _unescape(blob: np.ndarray, told: Layout) -> None:
    """Take the rank of an escaped weight for another: of row and column 0 of the first tile."""
    assert blob[told.codes] & 15 == 15
    blob[told.codes] &= 0xF0


def _twice(blob: np.ndarray, told: Layout) -> None:
    blob[told.table + 1] = blob[told.table]


def _thirteen_bits(blob: np.ndarray, told: Layout) -> None:
    table = blob[told.table :][: told.table_nbytes].view("<u2")
    table[table & 255 == 12] += 1


def _lengthen(blob: np.ndarray, told: Layout) -> None:
    """Shift a byte of the first tile from one lane to the next."""
    blob[told.extra + 3] -= 1
    blob[told.extra + 4] += 1


DAMAGE: dict[str, tuple[str, Harm, str]] = {
    "rank 15 named": ("fast", _set("table", 15, 1), "table is not valid"),
    "a high byte twice": ("fast", _twice, "table is not valid"),
    "index begins late": ("fast", _add("index", 0, 1), "index is not valid"),
    "index ends late": ("fast", _add("index", 4 * 4, 9), "index is not valid"),
    "index falls": ("fast", _swap_index, "index is not valid"),
    "escapes out of order": ("fast", _swap_escapes, "tile at row 0, column 0 is damaged"),
    "escape of row 32 or more": ("fast", _set("extra", 3, 0x80), "row 0, column 0 is damaged"),
    "escape of another column": ("fast", _add("extra", 2, 1), "row 0, column 0 is damaged"),
    "escaped low byte": ("fast", _set("low", 0, 1), "row 0, column 0 is damaged"),
    "escape without rank": ("fast", _unescape, "row 0, column 0 is damaged"),
    "rank without escape": ("fast", _set("codes", 1, 0xFF), "row 0, column 0 is damaged"),
    "thirteen bits": ("dense", _thirteen_bits, "table is not valid"),
    "an incomplete code": ("dense", _set("table", 0, 0), "table is not valid"),
    "index of units": ("dense", _add("index", 4, 1), "row 0, column 0 is damaged"),
    "dense index ends late": ("dense", _add("index", 4 * 4, 1), "index is not valid"),
    "a longer lane": ("dense", _lengthen, "row 0, column 0 is damaged"),
    "a far too long lane": ("dense", _set("extra", 0, 255), "row 0, column 0 is damaged"),
    "a lane beyond the matrix": ("dense", _set("extra", 2 * 32 + 1, 1), "row 32, column 0"),
    "between index and the next": ("dense", _set("index", 4 * 5, 1), "padding is not zero"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", DAMAGE)
def test_kinds_of_damage(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, engine)
    layout, harm, expected = DAMAGE[name]
    blob = BLOBS[layout].copy()
    told = parse(blob[:128].tobytes())
    harm(blob, told)
    seal(blob, told)
    assert expected in verdict(blob)


@pytest.mark.skipif("native" not in ENGINES, reason="no C++ compiler")
def test_a_table_that_leads_too_far_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "native")
    blob = BLOBS["dense"].copy()
    told = parse(blob[:128].tobytes())
    blob[told.table : told.index : 2] = 255
    with pytest.raises(Corrupt, match="damaged"):
        unpack(blob)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_must_be_zero(layout: str) -> None:
    told = parse(BLOBS[layout][:128].tobytes())
    groups = told.groups  # 9, of which the last holds 3 columns; 33 rows: lane 1 on is padding
    beyond_cols, beyond_rows = (groups - 1) * 512 + 3, groups * 512 + 16
    places = [told.low + beyond_cols, told.low + beyond_rows, told.nbytes - 1]
    if layout == "fast":
        places += [told.codes + (groups - 1) * 256 + 2, told.codes + groups * 256 + 8]
    for place in places:
        blob = BLOBS[layout].copy()
        blob[place] |= 1
        seal(blob, told)
        assert "padding is not zero" in verdict(blob)
    if layout == "fast":
        blob = BLOBS[layout].copy()
        blob[told.codes + (groups - 1) * 256 + 1] |= 0x10  # column 131
        seal(blob, told)
        assert "padding is not zero" in verdict(blob)


@pytest.mark.parametrize("engine", ENGINES)
def test_bits_behind_a_stream_must_be_zero(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, engine)
    blob = pack(of_counts([3, 2], "dense", 5), "BF16", "dense")  # a lane of five bits
    told = parse(blob[:128].tobytes())
    for bit in range(5, 8):
        harmed = blob.copy()
        harmed[told.codes] |= 1 << bit
        seal(harmed, told)
        assert "tile at row 0, column 0 is damaged" in verdict(harmed)
        with pytest.raises(Corrupt, match="w: .* damaged"):
            unpack(harmed, where="w")


def test_only_whole_byte_vectors_are_blobs() -> None:
    blob = BLOBS["fast"]
    for wrong in (blob.reshape(1, -1), blob.view(np.int8), blob[::2]):
        with pytest.raises(ValueError, match="contiguous 1-D uint8"):
            check(wrong)
