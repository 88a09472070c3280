"""docs/FORMAT.md as code: constants, dtypes and the header of a coded tensor."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from compress.codec.checksum import crc32c
from compress.errors import BadInput, Corrupt, did_you_mean

MAGIC = b"EPTR"
VERSION = 1
MIN_READER = 1
MAX_CODE_BITS = 12
STREAMS = 8
BLOCK_LOG2 = 16
MIN_BLOCK_LOG2 = 3
MAX_BLOCK_LOG2 = 18
GROUP_BLOCKS = 16
MAX_DIMS = 8
TAIL = 8

_FIXED = struct.Struct("<4s6B2xI16sQ")
HEADER_MAX = _FIXED.size + 8 * MAX_DIMS + 4

# Bits of one element by the name that safetensors gives the dtype.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}
# Word width and rotation of the dtypes that are not coded byte by byte.
_LAYOUT = {
    **dict.fromkeys(("BF16", "F16"), (2, 1)),
    **dict.fromkeys(("I16", "U16"), (2, 0)),
    **dict.fromkeys(("F32",), (4, 1)),
    **dict.fromkeys(("I32", "U32"), (4, 0)),
    **dict.fromkeys(("F64",), (8, 1)),
    **dict.fromkeys(("I64", "U64"), (8, 0)),
}


def dtype_bits(dtype: str) -> int:
    """Bits of one element of a safetensors dtype: 16 for ``BF16``. `BadInput` if unknown."""
    if dtype not in _BITS:
        raise BadInput(f"unknown dtype '{dtype}'", mend=did_you_mean(dtype, _BITS))
    return _BITS[dtype]


def name_crc(name: str) -> int:
    """The checksum of a tensor's name that its header carries."""
    return crc32c(name.encode("utf-8", "surrogatepass"))


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. `BadInput` for an unknown dtype or elements that end within a byte."""
    bits = prod(shape) * dtype_bits(dtype)
    if bits % 8:
        raise BadInput(f"{prod(shape)} elements of {dtype} do not fill whole bytes")
    return bits // 8


@dataclass(frozen=True)
class Header:
    """The front of a coded tensor.

    ``words`` words of ``width`` bytes, rotated if ``rotate``, in blocks of ``2 ** block_log2``;
    ``size`` is the header's own length in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    width: int
    rotate: int
    block_log2: int
    words: int
    name_crc: int
    version: int = VERSION
    min_reader: int = MIN_READER

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.words * self.width

    @property
    def size(self) -> int:
        return _FIXED.size + 8 * len(self.shape) + 4

    def pack(self) -> bytes:
        fixed = _FIXED.pack(
            MAGIC,
            self.version,
            self.min_reader,
            self.width,
            self.rotate,
            self.block_log2,
            len(self.shape),
            self.name_crc,
            self.dtype.encode(),
            self.words,
        )
        body = fixed + struct.pack(f"<{len(self.shape)}Q", *self.shape)
        return body + struct.pack("<I", crc32c(body))

    def tail(self, end_of_segments: int) -> bytes:
        """The zero bytes after segments that end at that offset of the coded tensor.

        One more than `TAIL` where the stored shape would otherwise equal the original one, so that
        a reader that does not know the format never takes the bytes for the tensor.
        """
        return bytes(TAIL + (self.shape == (end_of_segments + TAIL,)))


def make_header(name: str, dtype: str, shape: Sequence[int]) -> Header:
    """The header that this release writes. `BadInput` for what the format cannot hold."""
    nbytes = tensor_nbytes(dtype, shape)
    if len(shape) > MAX_DIMS:
        raise BadInput(
            "too many dimensions", where=name, got=len(shape), expected=f"at most {MAX_DIMS}"
        )
    width, rotate = _LAYOUT.get(dtype, (1, 0))
    return Header(dtype, tuple(shape), width, rotate, BLOCK_LOG2, nbytes // width, name_crc(name))


def parse_header(prefix: bytes | memoryview, name: str | None = None) -> Header:
    """Parse and check the header at the start of ``prefix``.

    ``prefix``: the first `HEADER_MAX` bytes of the coded tensor, or all of a shorter one. ``name``:
    the tensor's name, compared where given. Raises `Corrupt`, or `BadInput` if a newer release is
    needed to read the tensor.
    """

    def check(good: bool, what: str) -> None:
        if not good:
            raise Corrupt(what, where=name)

    prefix = bytes(prefix[:HEADER_MAX])
    check(len(prefix) > _FIXED.size, "truncated within the header of the coded tensor")
    magic, version, min_reader, width, rotate, block_log2, ndim, stored_name, dtype, words = (
        _FIXED.unpack_from(prefix)
    )
    check(magic == MAGIC, "is not a coded tensor: the first bytes are not EPTR")
    if min_reader > VERSION:
        raise BadInput(
            f"needs a reader of format {min_reader}, this one knows up to {VERSION}",
            where=name,
            mend="upgrade entropress",
        )
    check(ndim <= MAX_DIMS, "the header names more dimensions than the format allows")
    end = _FIXED.size + 8 * ndim
    check(len(prefix) >= end + 4, "truncated within the header of the coded tensor")
    stored_crc = int.from_bytes(prefix[end : end + 4], "little")
    check(crc32c(prefix[:end]) == stored_crc, "the header's checksum differs")
    check(1 <= min_reader <= version and prefix[10:12] == b"\0\0", "the header is not valid")
    check(width in (1, 2, 4, 8) and rotate in (0, 1), "the header's word layout is not valid")
    check(MIN_BLOCK_LOG2 <= block_log2 <= MAX_BLOCK_LOG2, "the header's block size is not valid")
    dtype_name = dtype.rstrip(b"\0").decode("ascii", "replace")
    shape = struct.unpack_from(f"<{ndim}Q", prefix, _FIXED.size)
    check(max(shape, default=0) < 1 << 63, "the header's shape is absurd")
    check(dtype_name in _BITS, f"the header names an unknown dtype {dtype_name!r}")
    check(
        prod(shape) * _BITS[dtype_name] == words * width * 8,
        "the header's shape and dtype disagree with its number of words",
    )
    check(
        name is None or name_crc(name) == stored_name,
        "the coded tensor was written under another name",
    )
    return Header(
        dtype_name, shape, width, rotate, block_log2, words, stored_name, version, min_reader
    )
