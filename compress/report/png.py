"""Whether bytes of somebody else are a small PNG and nothing but that."""

from __future__ import annotations

import re
import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ORDER = re.compile(rb"IHDR(PLTE)?(IDAT)+IEND")  # no text, no profiles, no animation
_PALETTE = 3
_CHANNELS = {0: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}  # by type of colour
_DEPTHS = {0: (1, 2, 4, 8), 2: (8,), _PALETTE: (1, 2, 4, 8), 4: (8,), 6: (8,)}
_FILTERS = 5


def png_size(data: bytes, most: int) -> tuple[int, int] | None:
    """Width and height of a PNG; None for what is none, or has a side of more than ``most`` pixels.

    It must have 8 bits a channel or fewer and no interlacing, the chunks that a picture needs and
    no others, right check sums, as many pixels as it says, and nothing behind its end. No more is
    unpacked than such a picture holds.
    """
    chunks = _chunks(data)
    if chunks is None or not _ORDER.fullmatch(b"".join(name for name, _ in chunks)):
        return None
    (_, header), *others, (_, end) = chunks
    palettes = [body for name, body in others if name == b"PLTE"]
    if len(header) != 13 or end or any(len(body) % 3 or not body for body in palettes):
        return None
    width, height, bits, colour, *methods = struct.unpack(">IIBBBBB", header)
    if not (1 <= width <= most and 1 <= height <= most) or methods != [0, 0, 0]:
        return None
    if bits not in _DEPTHS.get(colour, ()) or bool(palettes) != (colour == _PALETTE):
        return None
    packed = b"".join(body for name, body in others if name == b"IDAT")
    row = 1 + (width * _CHANNELS[colour] * bits + 7) // 8
    pixels = _unpacked(packed, height * row)
    if pixels is None or max(pixels[::row]) >= _FILTERS:
        return None
    return width, height


def _chunks(data: bytes) -> list[tuple[bytes, bytes]] | None:
    """Names and contents up to the end; None where they are cut short or a check sum is wrong."""
    if not data.startswith(_SIGNATURE):
        return None
    found = []
    place = len(_SIGNATURE)
    while place < len(data):
        head = data[place : place + 8]
        stop = place + 12 + int.from_bytes(head[:4])
        if stop > len(data):
            return None
        if zlib.crc32(data[place + 4 : stop - 4]) != int.from_bytes(data[stop - 4 : stop]):
            return None
        found.append((head[4:], data[place + 8 : stop - 4]))
        place = stop
    return found


def _unpacked(packed: bytes, size: int) -> bytes | None:
    """The ``size`` bytes in a stream of deflate; None where there are more, fewer, or none."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(packed, size + 1)
    except zlib.error:
        return None
    whole = stream.eof and not stream.unused_data
    return data if whole and len(data) == size else None
