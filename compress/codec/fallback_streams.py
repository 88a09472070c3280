"""Huffman streams in numpy: all streams of many blocks of one plane at once.

Decoding looks up a code at *every* bit position; what is left is to follow, in all streams
together, the chain of positions, one cheap step per symbol of a stream.
"""

from __future__ import annotations

import numpy as np

from compress.codec.format import MAX_CODE_BITS, STREAMS
from compress.codec.huffman import canonical_codes
from compress.codec.segment import Plane


def stream_bytes(plane: Plane, blocks: np.ndarray) -> np.ndarray:
    """Length in bytes of each stream (block × stream) for ``blocks`` (block × word, uint8)."""
    symbols, outside = _cut(blocks)
    bits: np.ndarray = _lengths(plane, symbols, outside).sum(axis=2, dtype=np.int64)
    return (bits + 7) // 8


def pack_streams(plane: Plane, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`stream_bytes`, and the streams' bytes, all blocks and streams back to back."""
    symbols, outside = _cut(blocks)
    lengths = _lengths(plane, symbols, outside).astype(np.uint64)
    codes = np.array(canonical_codes(plane.lengths), np.uint64)[symbols]
    codes[:, outside] = 0
    # Four codes of at most 12 bits are one item of at most 48, which touches at most two words.
    items, item_bits = codes[..., 0::4], lengths[..., 0::4]
    for i in range(1, 4):
        items = items << lengths[..., i::4] | codes[..., i::4]
        item_bits = item_bits + lengths[..., i::4]
    ends = np.cumsum(item_bits, axis=2)
    sizes = (ends[..., -1].astype(np.int64) + 7) // 8
    stream_ends = np.cumsum(sizes)
    starts = (stream_ends - sizes.ravel()).reshape(sizes.shape).astype(np.uint64)
    at = (ends - item_bits + (starts * np.uint64(8))[..., None]).ravel()

    packed = _or_into_words(items.ravel(), item_bits.ravel(), at, int(stream_ends[-1]))
    return sizes, packed


def _or_into_words(items: np.ndarray, bits: np.ndarray, at: np.ndarray, nbytes: int) -> np.ndarray:
    """Bytes with each item of so many bits at its bit position; positions never decrease."""
    words = np.zeros((nbytes >> 3) + 2, np.uint64)
    index = (at >> np.uint64(6)).astype(np.int64)
    spare = 64 - (at & np.uint64(63)).astype(np.int64) - bits.astype(np.int64)
    left, right = np.maximum(spare, 0).astype(np.uint64), np.maximum(-spare, 0).astype(np.uint64)
    first = np.flatnonzero(np.diff(index, prepend=-1))
    words[index[first]] = np.bitwise_or.reduceat(items << left >> right, first)
    # Only the last item that starts in a word can reach into the next one.
    last = np.append(first[1:], index.size) - 1
    over = last[spare[last] < 0]
    words[index[over] + 1] |= items[over] << np.uint64(64) - right[over]
    return words.astype(">u8").view(np.uint8)[:nbytes]


def decode_streams(
    plane: Plane, packed: np.ndarray, sizes: np.ndarray, words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decode ``packed``, the streams of ``sizes`` bytes (block × stream) back to back.

    Returns the symbols (block × word, uint8) and for each block whether its streams end where they
    should and are padded with zeros.
    """
    per_stream = -(-words // STREAMS)
    symbol_of, length_of = _window_tables(plane)
    total = 8 * packed.size
    padded = np.concatenate([packed, np.zeros(3, np.uint8)]).astype(np.intp)
    shifted = padded[:-3] << 24 | padded[1:-2] << 16 | padded[2:-1] << 8 | padded[3:]
    shifts = np.arange(20, 12, -1)
    mask = (1 << MAX_CODE_BITS) - 1
    windows = (shifted[:, None] >> shifts & mask).ravel()

    # Where each position leads; past the end everything leads to a position that no stream ends at.
    overrun = total + 1
    following = np.full(total + 2, overrun, np.intp)
    np.add(np.arange(total), length_of[windows], out=following[:total])
    np.minimum(following, overrun, out=following)
    ends = np.cumsum(sizes)
    position = np.empty((per_stream + 1, sizes.size), np.intp)
    position[0] = 8 * (ends - sizes.ravel())
    for step in range(per_stream):
        # In range by construction; with the default mode numpy would buffer.
        following.take(position[step], out=position[step + 1], mode="clip")

    count = np.clip(words - per_stream * np.arange(STREAMS), 0, per_stream)
    stop = position[np.tile(count, len(sizes)), np.arange(sizes.size)]
    unused = -stop % 8
    last = np.append(packed, 0)[np.minimum(stop >> 3, packed.size)]
    good = (stop + unused == 8 * ends) & (last & (1 << unused) - 1 == 0)

    visited = windows.take(position[:-1].T, mode="clip") if total else position[:-1].T * 0
    symbols = symbol_of[visited].reshape(len(sizes), -1)[:, :words]
    return symbols, good.reshape(sizes.shape).all(axis=1)


def _cut(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbols as block × stream × step, filled up to a multiple of 4 steps, and what is filling."""
    count, words = blocks.shape
    per_stream = -(-words // STREAMS)
    steps = -(-per_stream // 4) * 4
    symbols = np.zeros((count, STREAMS * per_stream), np.uint8)
    symbols[:, :words] = blocks
    outside = np.arange(STREAMS * per_stream) >= words
    fill = ((0, 0), (0, steps - per_stream))
    return (
        np.pad(symbols.reshape(count, STREAMS, per_stream), ((0, 0), *fill)),
        np.pad(outside.reshape(STREAMS, per_stream), fill, constant_values=True),
    )


def _lengths(plane: Plane, symbols: np.ndarray, outside: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.array(plane.lengths, np.uint8)[symbols]
    lengths[:, outside] = 0
    return lengths


def _window_tables(plane: Plane) -> tuple[np.ndarray, np.ndarray]:
    """Symbol and code length for each window of `MAX_CODE_BITS` bits."""
    lengths = np.array(plane.lengths)
    used = np.flatnonzero(lengths)
    used = used[np.argsort(lengths[used], kind="stable")]
    symbols = np.repeat(used, 1 << MAX_CODE_BITS - lengths[used])
    return symbols.astype(np.uint8), lengths[symbols]
