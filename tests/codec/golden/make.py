"""Writes the golden files: ``python tests/codec/golden/make.py`` from the repository's root.

They hold the format still: a file of ``v1`` is never changed once released, only added to. Made by
the pure-Python reference from seeded random inputs.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from pathlib import Path

from compress.codec import reference
from compress.codec.format import TAIL, Header, name_crc

DIRECTORY = Path(__file__).parent / "v1"
rng = random.Random(1)


def gaussian(count: int) -> bytes:
    """Roughly normal fp32 numbers of the size of weights."""
    sums = (sum(rng.random() for _ in range(12)) - 6 for _ in range(count))
    return b"".join(struct.pack("<f", 0.02 * value) for value in sums)


def upper_halves(data: bytes) -> bytes:
    """fp32 cut to bf16."""
    return b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))


def fibonacci_counts() -> bytes:
    """Symbols whose Huffman code would be longer than 12 bits."""
    counts = [1, 1]
    while len(counts) < 19:
        counts.append(counts[-1] + counts[-2])
    symbols = [10 * i for i, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(symbols)
    return bytes(symbols)


def cases() -> Iterator[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and bytes."""
    yield "bf16", "BF16", (40, 50), upper_halves(gaussian(2000))
    yield "bf16_special", "BF16", (9,), bytes.fromhex("000000800100018080ff807f81ffc17fffff")
    halves = (struct.pack("<e", value) for (value,) in struct.iter_unpack("<f", gaussian(1000)))
    yield "fp16", "F16", (1000,), b"".join(halves)
    yield "fp32", "F32", (30, 20), gaussian(600)
    doubles = (struct.pack("<d", value) for (value,) in struct.iter_unpack("<f", gaussian(300)))
    yield "fp64", "F64", (300,), b"".join(doubles)
    yield (
        "fp8",
        "F8_E4M3",
        (1500,),
        bytes(rng.choice((0x30, 0x31, 0xB0, 0x28)) for _ in range(1500)),
    )
    yield "int64", "I64", (200,), b"".join(struct.pack("<q", i * i) for i in range(-100, 100))
    yield "fp4", "F4", (50, 4), bytes(rng.choice((0x12, 0x21, 0x91)) for _ in range(100))
    yield "bool", "BOOL", (7, 11), bytes(rng.random() < 0.1 for _ in range(77))
    yield "scalar", "F32", (), struct.pack("<f", 1.5)
    yield "empty", "BF16", (0, 3), b""
    yield "one", "U8", (1,), b"\x2a"
    yield "eight_dimensions", "I16", (1, 2, 1, 2, 1, 2, 1, 2), bytes(range(32))
    yield "fail_closed", "U8", (82,), bytes(82)
    yield "random", "U8", (2000,), rng.randbytes(2000)
    yield "limited_code", "I8", (len(limited := fibonacci_counts()),), limited
    yield (
        "two_symbols_two_blocks",
        "U8",
        (65536 + 77,),
        b"\0\0\0\xff" * 16384 + b"\0\xff\0\0" * 19 + b"\0",
    )
    by_block = b"".join(bytes([symbol]) * 65536 for symbol in (1, 1, 2, 2, 3)) + b"\4\5\6"
    yield "segments_of_one_block", "U8", (len(by_block),), by_block


def small_blocks() -> tuple[str, bytes, bytes]:
    """A valid tensor that no writer of this project would write: blocks of eight words."""
    data = bytes(rng.choice(b"aaaaabbc") for _ in range(203))
    name = "small_blocks"
    front = Header("U8", (203,), 1, 0, 3, 203, name_crc(name)).pack()
    return name, front + reference.encode(data, 1, 0, 3) + bytes(TAIL), data


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    files = {
        name: (reference.encode_tensor(name, dtype, shape, data), data)
        for name, dtype, shape, data in cases()
    }
    name, blob, data = small_blocks()
    files[name] = blob, data
    lines = []
    for name, (blob, data) in files.items():
        (DIRECTORY / f"{name}.coded").write_bytes(blob)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    (DIRECTORY / "sha256").write_text("".join(lines))


if __name__ == "__main__":
    main()
