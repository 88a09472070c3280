"""What scoring the blocks costs beside running the model: `python benchmarks/calibration.py`.

In turn, on the same windows and as many threads: the model without its head, one window a thread,
and the same with the scorers looking on: those that `prune_blocks` reports, then all of them.

`--memory 8 64` measures memory in place of time: what a process with the model in it takes more
for the default scorers' pass over 8 windows, and another one over 64 (Linux only).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from compress import checkpoint
from compress.signals import (
    SCORERS,
    SCORERS_DEFAULT,
    collect,
    load_float32,
    run_base,
    windows,
)


def load(name: str, count: int, length: int) -> tuple[Any, torch.Tensor]:
    """The model and its windows of the calibration text."""
    opened = checkpoint.open(checkpoint.resolve(name))
    tokens = windows("builtin:calibration", opened.tokenizer(), count, length, seed=0)
    return load_float32(opened), tokens


def resident(field: str) -> float:
    """MiB of this process: VmRSS, what it holds, or VmHWM, the most since `clear_refs`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def memory(name: str, count: int, length: int, threads: int) -> tuple[float, float]:
    """MiB held before a pass over ``count`` windows, and at most while it runs."""
    model, tokens = load(name, count, length)
    collect(model, tokens[:threads], threads=threads)  # what a first pass sets up, it keeps
    Path("/proc/self/clear_refs").write_text("5")  # forget that loading took more
    before = resident("VmRSS")
    collect(model, tokens, threads=threads)
    return before, resident("VmHWM")


def show_memory(options: argparse.Namespace) -> None:
    length = options.windows[1]
    print(f"{options.model}, windows of {length} tokens, float32, {options.threads} threads\n")
    print("| windows | MiB before the pass | most in the pass | more |\n|---|---|---|---|")
    for count in options.memory:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            asked = pool.submit(memory, options.model, count, length, options.threads)
            before, most = asked.result()
        print(f"| {count} | {before:.0f} | {most:.0f} | {most - before:.0f} |", flush=True)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of all cores."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def show_time(options: argparse.Namespace) -> None:
    count, length = options.windows
    model, tokens = load(options.model, count, length)

    def window(row: torch.Tensor) -> None:
        with torch.inference_mode():
            run_base(model, row[None])

    def forward() -> None:
        with ThreadPoolExecutor(options.threads) as pool:
            list(pool.map(window, tokens))

    def scored(*scorers: str) -> Callable[[], object]:
        return lambda: collect(model, tokens, scorers=scorers, threads=options.threads)

    works = {"default": scored(*SCORERS_DEFAULT), "all": scored(*SCORERS)}
    if options.every:
        works = {"none": scored()} | {name: scored(name) for name in SCORERS} | works
    torch.set_num_threads(1)  # as `collect` does: the threads are the windows'
    forward()
    rounds = [
        (seconds(forward), {name: seconds(work) for name, work in works.items()})
        for _ in range(options.rounds)
    ]
    print(f"{options.model}, {count} windows of {length} tokens, float32, median of")
    print(f"{options.rounds} rounds, {options.threads} threads\n")
    print(
        "| scorers | seconds | of forward, wall clock | of forward, all cores |\n|---|---|---|---|"
    )
    print(f"| forward alone | {median(plain[0] for plain, _ in rounds):.2f} | 1 | 1 |")
    for name in works:
        wall = median(times[name][0] for _, times in rounds)
        ratios = [median(t[name][i] / plain[i] for plain, t in rounds) for i in (0, 1)]
        print(f"| {name} | {wall:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--windows", type=int, nargs=2, default=[8, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--every", action="store_true", help="each scorer by itself, too")
    parser.add_argument("--memory", type=int, nargs="+", help="numbers of windows")
    options = parser.parse_args()
    if options.memory:
        show_memory(options)
    else:
        show_time(options)


if __name__ == "__main__":
    main()
