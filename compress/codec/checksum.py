"""CRC-32C in pure Python: for headers, tables and the reference; backends bring a fast one."""

from __future__ import annotations

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reflected


def byte_table() -> list[int]:
    """The remainder of each byte followed by no others."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = byte_table()


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C (RFC 3720) of a buffer of bytes; that of ``123456789`` is ``0xE3069283``."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
