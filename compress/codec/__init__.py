"""Tensors as entropy-coded bytes and back (docs/FORMAT.md): bytes in, bytes out, no files.

The work is done by a backend: the native library where it can be had, numpy otherwise;
``ENTROPRESS_BACKEND=native`` or ``fallback`` forces one.
"""

from __future__ import annotations

from compress.codec import df11, packed
from compress.codec.api import (
    backend,
    decode,
    decode_part,
    decode_stream,
    encode,
    predict,
    read_header,
)
from compress.codec.format import HEADER_MAX, MAGIC, MIN_READER, Header, dtype_bits
from compress.codec.format import VERSION as FORMAT_VERSION
from compress.codec.huffman import code_lengths

__all__ = [
    "FORMAT_VERSION",
    "HEADER_MAX",
    "MAGIC",
    "MIN_READER",
    "Header",
    "backend",
    "code_lengths",
    "decode",
    "decode_part",
    "decode_stream",
    "df11",
    "dtype_bits",
    "encode",
    "packed",
    "predict",
    "read_header",
]
