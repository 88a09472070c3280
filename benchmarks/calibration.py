"""What scoring the blocks costs beside running the model: `python benchmarks/calibration.py`.

In turn, on the same windows and as many threads: the model without its head, one window a thread,
and the same with the scorers looking on: those that `prune_blocks` reports, then all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

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


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of all cores."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--windows", type=int, nargs=2, default=[8, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--every", action="store_true", help="each scorer by itself, too")
    options = parser.parse_args()

    count, length = options.windows
    opened = checkpoint.open(checkpoint.resolve(options.model))
    model = load_float32(opened)
    tokens = windows("builtin:calibration", opened.tokenizer(), count, length, seed=0)

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


if __name__ == "__main__":
    main()
