"""How fast ECSQ finds its steps and quantizes, beside memcpy: `python benchmarks/ecsq.py`.

A checkpoint of Gaussian bf16 matrices in memory. "read" copies every matrix out of the file; "fit"
finds one c for a rate, every matrix read twice or more; "quantize" reads and quantizes once more;
"rate" counts the bits of the codes as the codec has them. On the clock and of all cores, the
least of several runs. The peak is resident memory above what was there before the first run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from compress import checkpoint, codec
from compress.quant import Allocation, fit_rate, quantize_ecsq

SHAPES = [(2048, 2048), (5632, 2048), (2048, 5632), (512, 2048)]


def write(directory: Path, megabytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    left = megabytes * 500_000
    while left > 0:
        shape = SHAPES[len(tensors) % len(SHAPES)]
        spread = 0.02 * (0.3 * torch.randn(shape[0], 1, generator=generator)).exp()
        weights = torch.randn(shape, generator=generator) * spread
        tensors[f"{len(tensors)}.weight"] = weights.bfloat16()
        left -= weights.numel()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text("{}")


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[3.8, 2.5])
    parser.add_argument("--rdo", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as work:
        # In a process of its own, whose memory is not in this one's peak.
        writer = multiprocessing.get_context("spawn").Process(
            target=write, args=(Path(work), options.megabytes)
        )
        writer.start()
        writer.join()
        opened = checkpoint.open(work)
        infos = opened.tensor_infos()
        nbytes = sum(info.nbytes for info in infos.values())
        largest = opened.read(max(infos, key=lambda name: infos[name].nbytes))
        copy = torch.empty_like(largest)

        def copied() -> None:
            for _ in range(nbytes // largest.nbytes):
                copy.copy_(largest)

        def read() -> None:
            for name in infos:
                opened.read(name)

        found: Allocation | None = None

        def fit(rate: float) -> None:
            nonlocal found
            found = fit_rate(opened.read, list(infos), rate, torch.bfloat16, rdo=options.rdo)

        def quantize(rate: bool) -> None:
            assert found is not None
            for name, c in found.c.items():
                codes = quantize_ecsq(opened.read(name), c, torch.bfloat16, rdo=options.rdo)
                if rate:
                    codes.rate()

        print(f"{nbytes / 1e6:.0f} MB of bf16, largest matrix {largest.nbytes / 1e6:.0f} MB,")
        print(f"{options.threads} threads, {codec.backend()}, rdo {options.rdo}\n")
        print("| work | MB/s | MB a second of a core | of memcpy, clock | of memcpy, cores |")
        print("|---|---|---|---|---|")
        before = peak()
        base = seconds(copied, options.runs)
        show("memcpy", base, nbytes, base)
        show("read", seconds(read, options.runs), nbytes, base)
        for rate in options.rates:
            fitting = seconds(lambda rate=rate: fit(rate), options.runs)
            plain = seconds(lambda: quantize(False), options.runs)
            counted = seconds(lambda: quantize(True), options.runs)
            assert found is not None
            total = found.total.bits_per_weight
            show(f"fit {rate}: found {total:.4f}", fitting, nbytes, base)
            show(f"quantize at {rate}", plain, nbytes, base)
            show(f"quantize and rate at {rate}", counted, nbytes, base)
            both = fitting[0] + plain[0], fitting[1] + plain[1]
            show(f"fit and quantize at {rate}", both, nbytes, base)
        print(f"\npeak {(peak() - before) / 1e6:.0f} MB above the start")


def seconds(work: Callable[[], None], runs: int) -> tuple[float, float]:
    """On the clock, and of all cores."""
    found = []
    for _ in range(runs):
        wall, busy = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - wall, time.process_time() - busy))
    return min(wall for wall, _ in found), min(busy for _, busy in found)


def show(name: str, taken: tuple[float, float], nbytes: int, base: tuple[float, float]) -> None:
    """A row of the table, ``base`` being what memcpy takes."""
    wall, busy = taken
    rates = f"{nbytes / wall / 1e6:.0f} | {nbytes / busy / 1e6:.0f}"
    print(f"| {name} | {rates} | {wall / base[0]:.1f} | {busy / base[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
