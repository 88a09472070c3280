"""Perplexity after a prompt whose cache was compressed: `python benchmarks/kv.py`.

Each document is a window of text: the model reads a prefix, its cache is cut to a share of its
bytes, and the continuation is judged. Rivals hold the same bytes. Shares of layers other than the
paper's, and groups of heads, are compared on calibration text, of windows that did not serve to
measure entropies; the best of them there is measured on the held-out text beside the others.
Intervals: ratios of perplexity over the same documents (BCa bootstrap, 95 %).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from compress import checkpoint
from compress.evaluate import Interval, bootstrap_interval
from compress.signals import load_float32, windows
from compress.tokens import (
    CachePolicy,
    compressing,
    high_heads,
    pyramid,
    query_entropies,
    uncomp_shares,
)

LAST = 32  # of a prefix: the piece that is read with the engine, after which the cache is cut


class Text:
    """Documents [count, tokens] and the caches of their prefixes, read once for all policies."""

    def __init__(self, model: Any, tokens: torch.Tensor, prefix: int, batch: int) -> None:
        self.model, self.prefix = model, prefix
        self.batches = tokens.split(batch)
        self.caches = [DynamicCache() for _ in self.batches]
        with torch.inference_mode():
            for rows, cache in zip(self.batches, self.caches, strict=True):
                model.base_model(rows[:, : prefix - LAST], past_key_values=cache)

    def losses(self, policy: CachePolicy) -> tuple[np.ndarray, float]:
        """The mean loss a token of each continuation, and the share of the bytes that was held."""
        found, share = [], 1.0
        for rows, cache in zip(self.batches, self.caches, strict=True):
            own = copy.deepcopy(cache)
            with torch.inference_mode():
                with compressing(self.model, policy) as engine:
                    last = rows[:, self.prefix - LAST : self.prefix]
                    self.model.base_model(last, past_key_values=own)
                share = share if engine.report is None else engine.report.share
                with compressing(self.model, CachePolicy(1.0)):  # the continuation stays whole
                    logits = self.model(rows[:, self.prefix :], past_key_values=own).logits
            targets = rows[:, self.prefix + 1 :]
            nll = cross_entropy(logits[:, :-1].mT, targets, reduction="none")
            found += nll.double().mean(1).tolist()
        return np.array(found), share


def alternatives(entropies: torch.Tensor, key_heads: int, head_dim: int) -> dict[str, CachePolicy]:
    """Policies beside the uniform one: the paper's, its rivals, and other readings of entropy."""
    layers, uncomp = len(entropies), np.array(uncomp_shares(entropies))
    rank = np.exp(entropies.mean(1).numpy() * np.log(head_dim))
    high = high_heads(entropies, key_heads)
    low = high_heads(-entropies, key_heads)
    shares = {
        "pyramid": np.array(pyramid(layers)),
        "uncomp": uncomp,
        "uncomp, half way to uniform": (1 + uncomp) / 2,
        "uncomp, more to later stages": 2 - uncomp,
        "by effective rank of queries": rank,
        "by its inverse": 1 / rank,
    }
    policies = {name: CachePolicy(0.25, shares=tuple(each)) for name, each in shares.items()}
    policies["uniform, high heads double"] = CachePolicy(0.25, head_groups=high)
    policies["uniform, low heads double"] = CachePolicy(0.25, head_groups=low)
    policies["uncomp, high heads double"] = replace(policies["uncomp"], head_groups=high)
    return policies


def ratio(base: np.ndarray, other: np.ndarray) -> Interval:
    return bootstrap_interval(lambda x, axis: np.exp(x.mean(axis)), [other - base])


def table(text: Text, policies: Mapping[str, CachePolicy], whole: np.ndarray) -> dict[str, Any]:
    """Print a line a policy, the first of which the others are compared to."""
    print("| policy | bytes | perplexity | × whole cache | × first line |\n|---|---|---|---|---|")
    found: dict[str, Any] = {}
    for name, policy in policies.items():
        nll, share = text.losses(policy)
        found[name] = nll
        cells = [f"{share:.4f}", f"{np.exp(nll.mean()):.3f}"]
        for base in (whole, next(iter(found.values()))):
            interval = ratio(base, nll)
            cells.append(f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print()
    return found


def at(policies: Mapping[str, CachePolicy], names: Sequence[str], budget: float) -> dict[str, Any]:
    return {name: replace(policies[name], budget=budget) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--text", default="builtin:heldout")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--calibration", type=int, nargs=2, default=[8, 12])
    parser.add_argument("--prefix", type=int, default=384)
    parser.add_argument("--continuation", type=int, default=128)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/kv.json"))
    options = parser.parse_args()

    opened = checkpoint.open(checkpoint.resolve(options.model))
    tokenizer, model = opened.tokenizer(), load_float32(opened)
    length = options.prefix + options.continuation
    measured, compared = options.calibration
    rows = windows("builtin:calibration", tokenizer, measured + compared, length, 0)
    entropies = query_entropies(model, rows[:measured])
    config = model.config.get_text_config(decoder=True)
    policies = alternatives(entropies, config.num_key_value_heads, config.head_dim)
    print("mean entropy of queries by layer:", *(f"{x:.3f}" for x in entropies.mean(1).tolist()))
    print("uncomp's shares by layer:", *(f"{x:.2f}" for x in policies["uncomp"].shares or ()), "\n")

    uniform = {"uniform": CachePolicy(0.25)}
    text = Text(model, rows[measured:], options.prefix, options.batch)
    whole, _ = text.losses(CachePolicy(1.0))
    print(
        f"### builtin:calibration, {compared} documents, 25 %, whole {np.exp(whole.mean()):.3f}\n"
    )
    seen = table(text, uniform | policies, whole)
    new = [name for name in policies if name not in ("pyramid", "uncomp")]
    chosen = min(new, key=lambda name: seen[name].mean())
    print(f"best on calibration text beside uniform, pyramid and uncomp: {chosen}\n")

    scorers: tuple[Any, ...] = "knorm", "recent", "random"
    policies |= {f"uniform, {name}": CachePolicy(0.25, scorer=name) for name in scorers}
    names = ["pyramid", "uncomp", "uncomp, high heads double", chosen]
    names = list(dict.fromkeys([*names, *(f"uniform, {name}" for name in scorers)]))
    text = Text(
        model,
        windows(options.text, tokenizer, options.documents, length, 0),
        options.prefix,
        options.batch,
    )
    whole, _ = text.losses(CachePolicy(1.0))
    losses: dict[str, Any] = {"whole": whole, "entropies": entropies.numpy()}
    for budget in options.budgets:
        title = f"{options.text}, {options.documents} documents, {budget:.0%}"
        print(f"### {title}, whole {np.exp(whole.mean()):.3f}\n")
        losses[str(budget)] = table(
            text, at(uniform | policies, ["uniform", *names], budget), whole
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(losses, default=lambda array: array.tolist()))


if __name__ == "__main__":
    main()
