"""Held-out perplexity after each scorer's choice: `python benchmarks/scorers.py`.

One calibration pass gives all scorers' choices of blocks, or with `--part attention` or `mlp` of
those parts of blocks; each is applied to the loaded model and measured on `builtin:heldout`, beside
random choices of as many unprotected ones and the whole model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection
from typing import Any

from compress import checkpoint
from compress.evaluate import Documents, losses, perplexity
from compress.prune import choose, find_sublayers, silenced, sublayer_parts
from compress.signals import (
    SCORERS,
    SCORERS_DEFAULT,
    collect,
    find_blocks,
    load_float32,
    protected_blocks,
    windows,
)


def without(model: Any, part: str, removed: Collection[int], heldout: Documents) -> float:
    """Perplexity with the blocks ``removed``, or that part of them, adding nothing."""
    if part != "block":
        both = (removed, ()) if part == "attention" else ((), removed)
        with silenced(model, find_sublayers(model), *both):
            return perplexity(losses(model, heldout))
    blocks = find_blocks(model)
    hooks = [blocks[i].register_forward_hook(lambda _, args, out: args[0]) for i in removed]
    try:
        return perplexity(losses(model, heldout))
    finally:
        for hook in hooks:
            hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--drop", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--calibration", type=int, nargs=2, default=[32, 256])
    parser.add_argument("--heldout", type=int, nargs=2, default=[32, 256])
    parser.add_argument("--random", type=int, default=3, help="random choices of each size")
    parser.add_argument("--part", default="block", choices=["block", "attention", "mlp"])
    parser.add_argument("--scorers", nargs="+", default=SCORERS_DEFAULT, choices=SCORERS)
    options = parser.parse_args()

    opened = checkpoint.open(checkpoint.resolve(options.model))
    tokenizer, model = opened.tokenizer(), load_float32(opened)
    calibration = windows("builtin:calibration", tokenizer, *options.calibration, seed=0)
    text = list(windows("builtin:heldout", tokenizer, *options.heldout, seed=0))
    heldout = Documents(text, list(range(len(text))), len(text))
    parts = None
    if options.part != "block":
        parts = sublayer_parts(model, find_sublayers(model), options.part)
    table = collect(model, calibration, parts=parts, scorers=options.scorers)
    free = sorted(set(range(table.blocks)) - set(protected_blocks(table.blocks, None)))
    chance = random.Random(0)
    print(f"{options.model}: perplexity {perplexity(losses(model, heldout)):.2f} with all blocks\n")
    print("| scorer | drop | blocks | perplexity |\n|---|---|---|---|")
    for drop in options.drop:
        choices = [(scorer, choose(table, scorer, drop)) for scorer in options.scorers]
        choices += [("random", sorted(chance.sample(free, drop))) for _ in range(options.random)]
        for scorer, removed in choices:
            listed = " ".join(map(str, removed))
            value = without(model, options.part, removed, heldout)
            print(f"| {scorer} | {drop} | {listed} | {value:.2f} |", flush=True)


if __name__ == "__main__":
    main()
