"""Our codec beside memcpy, zstd, zipnn and lmzip, in one process on the same bytes: `make bench`.

Every round trip is compared byte for byte. Encoding includes whatever a codec always does (ours:
checksums, and decoding again to compare); decoding goes into a buffer that exists already where
the codec can do that (ours and memcpy). lmzip works from file to file, so its files lie in memory.
Times are wall clock, the least of several runs that take turns, after a run that does not count;
copies that a codec needs because it spoils its input, and the joining of pieces, are left out.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from compress import checkpoint, codec

TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass
class Data:
    """Consecutive tensors of one dtype, as bytes."""

    name: str
    dtype: str
    values: np.ndarray

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Data:
        dtype = next(d for d, t in TORCH.items() if t == tensor.dtype)
        return cls(name, dtype, tensor.contiguous().view(torch.uint8).numpy())


@dataclass
class Codec:
    """``encode(given) -> coded``; ``decode(stored, out) -> bytes``, in ``out`` where it can.

    ``give`` and ``store`` make what they work on, outside the measured time.
    """

    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any, np.ndarray], Any]
    give: Callable[[np.ndarray], Any] = lambda data: data
    store: Callable[[Any], Any] = lambda coded: coded
    size: Callable[[Any], int] = len
    encoding: float = field(default=float("inf"))
    decoding: float = field(default=float("inf"))

    def run(self, data: np.ndarray, out: np.ndarray) -> int:
        """One round trip; keeps the least times and returns the coded size."""
        given = self.give(data)
        start = time.perf_counter()
        coded = self.encode(given)
        self.encoding = min(self.encoding, time.perf_counter() - start)
        stored = self.store(coded)
        size = self.size(stored)
        start = time.perf_counter()
        back = self.decode(stored, out)
        self.decoding = min(self.decoding, time.perf_counter() - start)
        if not np.array_equal(np.frombuffer(back, dtype=np.uint8), data):
            raise SystemExit(f"{self.name}: the round trip differs")
        return size


def memcpy() -> Codec:
    def decode(coded: np.ndarray, out: np.ndarray) -> np.ndarray:
        np.copyto(out, coded)
        return out

    return Codec("memcpy", np.copy, decode)


def ours(dtype: str, threads: int) -> Codec:
    def encode(data: np.ndarray) -> list[bytes | memoryview]:
        shape = (data.size * 8 // codec.dtype_bits(dtype),)
        return list(codec.encode("weights", dtype, shape, [data], threads=threads))

    def decode(coded: bytes, out: np.ndarray) -> np.ndarray:
        return codec.decode(coded, "weights", out=out, threads=threads)

    return Codec("entropress", encode, decode, store=b"".join)


def zstd(threads: int) -> Codec:
    import zstandard

    pack = zstandard.ZstdCompressor(level=3, threads=threads if threads > 1 else 0)
    unpack = zstandard.ZstdDecompressor()
    return Codec("zstd -3", pack.compress, lambda coded, out: unpack.decompress(coded))


def zipnn(dtype: str, threads: int) -> Codec:
    from zipnn import ZipNN

    name = str(TORCH[dtype]).removeprefix("torch.")
    pack = ZipNN(bytearray_dtype=name, input_format="byte", threads=threads)
    # It changes its input in place, hence the copies.
    return Codec(
        "zipnn", pack.compress, lambda coded, out: pack.decompress(coded), bytearray, bytearray
    )


def lmzip(data: Data, threads: int, directory: Path) -> Codec:
    import lmz

    source, packed, restored = (str(directory / n) for n in ("in.safetensors", "packed", "out"))
    save_file({"weights": torch.from_numpy(data.values).view(TORCH[data.dtype])}, source)

    def encode(_: np.ndarray) -> Path:
        Path(packed).unlink(missing_ok=True)
        lmz.compress(source, packed, workers=threads)
        return Path(packed)

    def decode(coded: Path, out: np.ndarray) -> np.ndarray:
        lmz.decompress(str(coded), restored, workers=threads, overwrite=True)
        return np.fromfile(restored, dtype=np.uint8)[-out.size :]

    return Codec("lmzip", encode, decode, size=lambda path: path.stat().st_size)


def flat(model: str) -> torch.Tensor:
    """All floating-point tensors of an embedded model, one after the other."""
    opened = checkpoint.open(checkpoint.resolve(model))
    tensors = (opened.read(name) for name in opened.tensor_infos())
    return torch.cat([t.flatten() for t in tensors if t.is_floating_point()])


def datasets() -> Iterator[Data]:
    minilm = flat("demo:minilm")
    yield Data.of("MiniLM bf16", minilm.bfloat16())
    yield Data.of("MiniLM fp32", minilm)
    yield Data.of("SmolLM2 bf16", flat("demo:smollm2-135m"))
    noise = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0)) * 0.02
    yield Data.of("Gaussian bf16", noise.bfloat16())


def measure(data: Data, threads: int, runs: int, directory: Path) -> Iterator[str]:
    """Table rows: codecs take turns within each run, so that drift of the machine hits all."""
    codecs = [
        memcpy(),
        ours(data.dtype, threads),
        zipnn(data.dtype, threads),
        lmzip(data, threads, directory),
        zstd(threads),
    ]
    out = np.zeros_like(data.values)
    for c in codecs:
        c.run(data.values, out)
        c.encoding = c.decoding = float("inf")
    sizes = {}
    for run in range(runs):
        for c in codecs:
            if run < 3 or c.name in ("memcpy", "entropress", "zipnn"):  # the others are slow
                sizes[c.name] = c.run(data.values, out)
    giga, copy = data.values.size / 1e9, codecs[0].decoding
    for c in codecs:
        yield (
            f"| {data.name} | {threads} | {c.name} | {sizes[c.name] / data.values.size:.2%} | "
            f"{giga / c.encoding:.2f} | {giga / c.decoding:.2f} | {copy / c.decoding:.2f} |"
        )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} threads" if models else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {processor()}, {codec.backend()}\n")
    print("| data | threads | codec | size | encode GB/s | decode GB/s | decode / memcpy |")
    print("|---|---|---|---|---|---|---|")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        for data in datasets():
            for threads in options.threads:
                for row in measure(data, threads, options.runs, Path(directory)):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
