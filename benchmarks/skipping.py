"""What skipping dropped attentions saves: `python benchmarks/skipping.py`.

The last unprotected attentions are dropped, as many as asked for; quality is not the point here.
The checkpoint is then loaded twice, whole (it computes the zeros) and skipped, and the two take
turns: greedy generation, whose tokens are compared, and the prefill alone. Wall clock, medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from compress import checkpoint
from compress.hf import skip_sublayers
from compress.prune import block_count, drop_sublayers
from compress.signals import protected_blocks, windows

HEADER = """\
| dropped | weights left | batch | tokens/s whole | skipped | ratio | prefill ms whole | skipped \
| ratio | KV cache MB whole | skipped |
|---|---|---|---|---|---|---|---|---|---|---|"""


def seconds(work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work(*given)
    return time.perf_counter() - start, result


def prefilled(model: Any, tokens: torch.Tensor) -> Any:
    return model(tokens, use_cache=True, logits_to_keep=1)


def generated(model: Any, tokens: torch.Tensor, new: int) -> Any:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )


def cache_nbytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measured(pair: list[Any], tokens: torch.Tensor, new: int, rounds: int) -> str:
    """The cells of a row from the batch on."""
    generation: list[list[float]] = [[], []]
    prefill: list[list[float]] = [[], []]
    outputs: list[Any] = [None, None]
    for turn in range(rounds + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            length, outputs[which] = seconds(generated, pair[which], tokens, new)
            start, _ = seconds(prefilled, pair[which], tokens)
            if turn:  # the first does not count
                generation[which].append(length)
                prefill[which].append(start)
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    speeds = [tokens.shape[0] * new / statistics.median(times) for times in generation]
    starts = [1e3 * statistics.median(times) for times in prefill]
    sizes = [cache_nbytes(output.past_key_values) / 1e6 for output in outputs]
    return (
        f"{tokens.shape[0]} | {speeds[0]:.1f} | {speeds[1]:.1f} | {speeds[1] / speeds[0]:.2f} "
        f"| {starts[0]:.0f} | {starts[1]:.0f} | {starts[0] / starts[1]:.2f} "
        f"| {sizes[0]:.2f} | {sizes[1]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--drop", type=int, nargs="+", default=[0, 4, 8, 15])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    opened = checkpoint.open(checkpoint.resolve(options.model))
    blocks = block_count(opened.config)
    free = sorted(set(range(blocks)) - set(protected_blocks(blocks, None)))
    text = windows(
        "builtin:heldout", opened.tokenizer(), max(options.batch), options.prompt, seed=0
    )
    tokens = torch.stack(list(text))
    print(f"{options.model}, {blocks} blocks, {options.dtype}, {options.threads} threads, ", end="")
    print(f"prompt {options.prompt}, {options.new} new tokens\n\n{HEADER}")
    for drop in options.drop:
        with tempfile.TemporaryDirectory() as directory:
            path = opened.path
            if drop:
                path = Path(directory)
                drop_sublayers(opened, free[-drop:], (), path)
            pair = [
                AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype) for _ in range(2)
            ]
        skip_sublayers(pair[1])
        left = pair[1].num_parameters() / pair[0].num_parameters()
        for batch in options.batch:
            with torch.inference_mode():
                cells = measured(pair, tokens[:batch], options.new, options.rounds)
            print(f"| {drop} | {left:.1%} | {cells}", flush=True)


if __name__ == "__main__":
    main()
