"""What comparing two models costs beside running one: `python benchmarks/divergence.py`.

In turn, on the same windows: a forward pass of the reference, and the whole of `divergence`. The
candidate is as large as the reference, so two forward passes are the least there can be.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from compress import checkpoint
from compress.evaluate import Documents, divergence
from compress.signals import load_float32, windows


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """On the clock, and of all cores."""
    wall, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--candidate", help="default: the model itself, loaded twice")
    parser.add_argument("--windows", type=int, nargs=2, default=[4, 512])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    opened = checkpoint.open(checkpoint.resolve(options.model))
    other = checkpoint.open(checkpoint.resolve(options.candidate or options.model))
    reference, candidate = load_float32(opened), load_float32(other)
    tokens = list(windows("builtin:heldout", opened.tokenizer(), *options.windows, seed=0))
    documents = Documents(tokens, list(range(len(tokens))), len(tokens))

    def forward() -> None:
        with torch.inference_mode():
            for window in tokens:
                reference(input_ids=window[None], use_cache=False)

    def compare() -> None:
        divergence(reference, candidate, documents)

    forward()
    rounds = [(seconds(forward), seconds(compare)) for _ in range(options.rounds)]
    count, length = options.windows
    print(f"{options.model}, {count} windows of {length} tokens, float32, median of")
    print(f"{options.rounds} rounds, {torch.get_num_threads()} threads\n")
    print("| seconds a window | forward | divergence | ratio |\n|---|---|---|---|")
    for column, title in enumerate(("wall clock", "all cores")):
        one, both = (median(times[i][column] for times in rounds) / count for i in (0, 1))
        ratio = median(both[column] / one[column] for one, both in rounds)
        print(f"| {title} | {one:.3f} | {both:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
