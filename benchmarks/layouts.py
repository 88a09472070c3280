"""Packed layouts on the CPU: bits a weight, speed beside memcpy: `python benchmarks/layouts.py`.

All matrices of a model, each packed and unpacked by itself into new memory as a model that is moved
to a GPU would have it; packing includes unpacking again to compare. "stored" is docs/FORMAT.md's
coding of the same matrix, for comparison. Wall clock, least of several runs that take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from compress import checkpoint, codec

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16}


def matrices(model: str, dtype: torch.dtype) -> list[np.ndarray]:
    """Matrices of a model as words, cast from what they are."""
    if model == "gaussian":
        chance = torch.Generator().manual_seed(0)
        found = [0.02 * torch.randn(2048, 2048, generator=chance) for _ in range(6)]
    else:
        source = checkpoint.open(checkpoint.resolve(model))
        names = [name for name, info in source.tensor_infos().items() if len(info.shape) == 2]
        found = [source.read(name) for name in names]
    return [weight.to(dtype).contiguous().view(torch.uint16).numpy() for weight in found]


def least(runs: int, *works: Callable[[], object]) -> list[float]:
    """Seconds of each, the least of runs in which they take turns."""
    best = [float("inf")] * len(works)
    for _ in range(runs):
        for i, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print("| weights | form | bits a weight | pack GB/s | unpack GB/s | memcpy GB/s |")
    print("|---|---|---|---|---|---|")
    for model in ("demo:minilm", "demo:smollm2-135m", "gaussian"):
        for kind, dtype in KINDS.items():
            words = matrices(model, dtype)
            row(f"{model} {kind.lower()}", kind, words, given.threads, given.runs)


def row(name: str, kind: str, words: list[np.ndarray], threads: int, runs: int) -> None:
    nbytes, count = sum(w.nbytes for w in words), sum(w.size for w in words)
    coded = sum(codec.predict(kind, [w.view(np.uint8)], w.shape) for w in words)
    print(f"| {name} | stored | {8 * coded / count:.2f} | | | |")
    for layout in codec.packed.LAYOUTS:

        def pack(layout: str = layout) -> list[np.ndarray]:
            return [codec.packed.pack(w, kind, layout, threads=threads) for w in words]

        blobs = pack()
        size = sum(blob.nbytes for blob in blobs)
        bits = f"{8 * size / count:.2f}" + (" (larger than the weights)" if size >= nbytes else "")
        seconds = least(
            runs,
            pack,
            lambda blobs=blobs: [codec.packed.unpack(blob, threads=threads) for blob in blobs],
            lambda: [w.copy() for w in words],
        )
        speeds = " | ".join(f"{nbytes / s / 1e9:.2f}" for s in seconds)
        print(f"| {name} | {layout} | {bits} | {speeds} |", flush=True)


if __name__ == "__main__":
    main()
