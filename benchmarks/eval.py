"""What `run_tasks` costs above lm-eval itself: `python benchmarks/eval.py`.

Both evaluate the same tasks in one process, turn by turn after a turn that does not count; a run of
ours has a fresh journal each time. Compared are CPU seconds and wall clock, each the least of all
turns, from the model's directory to the results, loading included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from compress import checkpoint, evaluate
from compress.evaluate import EvalOptions, run_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["entropress_facts"])
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    opened = checkpoint.open(checkpoint.resolve(options.model))
    suite = Path(evaluate.__file__).parent / "suite"
    places = [str(suite), *([options.include_path] if options.include_path else [])]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def theirs() -> dict[str, Any]:
        lm = HFLM(
            str(opened.path),
            device="cpu",
            dtype="float32",
            softmax_dtype="float32",
            batch_size=options.batch_size,
        )
        return lm_eval.simple_evaluate(
            lm,
            tasks=options.tasks,
            limit=options.limit,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=places, include_defaults=False),
        )

    def ours() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as journal:
            asked = EvalOptions(
                tuple(options.tasks),
                options.include_path,
                limit=options.limit,
                batch_size=options.batch_size,
                dtype="float32",
                device="cpu",
            )
            return run_tasks(opened, asked, Path(journal)).results

    least: dict[str, tuple[float, float]] = {}
    for turn in range(options.turns + 1):
        results = []
        for name, run in (("lm-eval", theirs), ("entropress", ours)):
            cpu, wall, result = measured(run)
            results.append(result)
            if turn:
                before = least.get(name, (cpu, wall))
                least[name] = min(before[0], cpu), min(before[1], wall)
        if results[0]["samples"] != results[1]["samples"]:
            raise SystemExit("the results differ")
    print(f"{options.model}, {', '.join(options.tasks)}, {options.limit} documents a task,")
    print(f"batches of {options.batch_size}, {torch.get_num_threads()} threads\n")
    print("| | CPU s | wall s |\n|---|---|---|")
    for name, (cpu, wall) in least.items():
        print(f"| {name} | {cpu:.2f} | {wall:.2f} |")
    ratios = [ours / theirs - 1 for theirs, ours in zip(*least.values(), strict=True)]
    print(f"| more | {ratios[0]:+.1%} | {ratios[1]:+.1%} |")


def measured(run: Callable[[], dict[str, Any]]) -> tuple[float, float, dict[str, Any]]:
    """CPU seconds, wall-clock seconds and results of a run, whose bars are not shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        cpu, wall = time.process_time(), time.perf_counter()
        results = run()
        return time.process_time() - cpu, time.perf_counter() - wall, results


if __name__ == "__main__":
    main()
