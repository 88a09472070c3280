"""Held-out perplexity of every rule and search: `python benchmarks/pruning.py`.

Each rule chooses on `builtin:calibration`; what it chose is measured on texts that it did not see,
beside random choices and the whole model. Intervals are of the perplexity ratio to the whole model,
over the same sequences (BCa bootstrap, 95 %). The last line of a table holds the best one-pass
scorer of that text against the default, `search: evolutionary`.
What was measured for the searches is kept in `--journal`, so that a run can be taken up again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from compress import checkpoint
from compress.evaluate import Interval, bootstrap_interval
from compress.prune import (
    Budget,
    Evolution,
    Removal,
    RemovalLoss,
    Units,
    find_units,
    last_first,
    random_order,
    select,
)
from compress.signals import SCORERS, collect, load_float32, windows

SEARCHED = {
    "best_scorer": {"scorer": "norm_ratio", "search": "best_scorer"},
    "iterative norm_ratio": {"scorer": "norm_ratio", "search": "iterative"},
    "greedy": {"scorer": "leave_one_out_kl", "search": "greedy"},
    "evolutionary": {"scorer": "norm_ratio", "search": "evolutionary"},
}


def chosen(
    model: Any, units: Units, budget: Budget, tokens: Any, unseen: Any, tables: Any, options: Any
) -> dict[str, Removal]:
    """What every rule and search would remove; ``tables``: the scores of all one-pass rules."""
    journal = options.journal / "-".join(units.kinds)
    journal.mkdir(parents=True, exist_ok=True)
    evolution = Evolution(
        generations=options.generations, offspring=options.offspring, tokens=(1024, 4096)
    )

    def pick(**rules: Any) -> Any:
        return select(
            model,
            units,
            budget,
            tokens,
            unseen,
            tables=tables,
            journal=journal,
            evolution=evolution,
            **rules,
        )

    best = pick(scorer="norm_ratio", search="best_scorer")
    found = {each.rule: each.removed for each in best.candidates}
    rules = ["leave_one_out_kl", "leave_one_out_perplexity"]
    rules += ["window_angular"] if units.kinds == ("block",) else []
    rules += [rule for rule in SCORERS if rule not in found]
    found |= {rule: pick(scorer=rule).removed for rule in rules}
    found["last_k"] = budget.cut(last_first(budget.units))
    for seed in range(options.random):
        found[f"random {seed}"] = budget.cut(random_order(budget.units, seed))
    found["best_scorer"] = best.removed
    searches = {name: rules for name, rules in SEARCHED.items() if name != "best_scorer"}
    return found | {name: pick(**rules).removed for name, rules in searches.items()}


def ratio(base: list[float], nll: list[float]) -> Interval:
    """By how much the perplexity grew; from the mean loss a token of each sequence."""
    added = np.array(nll) - np.array(base)
    return bootstrap_interval(lambda x, axis: np.exp(x.mean(axis)), [added])


def report(sets: dict[str, Removal], losses: dict[str, dict[Removal, list[float]]]) -> None:
    """One table: a line a rule, a column a text."""
    for rule, removed in sets.items():
        cells = []
        for text in losses.values():
            found = ratio(text[frozenset()], text[removed])
            perplexity = math.exp(sum(text[removed]) / len(text[removed]))
            cells.append(f"{perplexity:.2f} [×{found.low:.2f}, ×{found.high:.2f}]")
        listed = " ".join(f"{kind[0]}{i}" for kind, i in sorted(removed))
        print(f"| {rule} | {listed} | {' | '.join(cells)} |", flush=True)
    verdicts = []
    for text in losses.values():
        single = min((sets[rule] for rule in SCORERS if rule in sets), key=lambda r: sum(text[r]))
        found = ratio(text[single], text[sets["evolutionary"]])
        verdicts.append(f"×{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]")
    print(f"| *evolutionary against the best single scorer* | | {' | '.join(verdicts)} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--attention", type=int, nargs="*", default=[2, 4, 6])
    parser.add_argument("--block", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--mlp", type=int, nargs="*", default=[])
    parser.add_argument("--joint", type=int, nargs="*", default=[])
    parser.add_argument("--texts", nargs="+", default=["builtin:heldout"])
    parser.add_argument("--calibration", type=int, nargs=2, default=[16, 256])
    parser.add_argument("--heldout", type=int, nargs=2, default=[16, 256])
    parser.add_argument("--random", type=int, default=5, help="random choices of each size")
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--offspring", type=int, default=8)
    parser.add_argument("--journal", type=Path, default=Path("out/pruning"))
    options = parser.parse_args()

    opened = checkpoint.open(checkpoint.resolve(options.model))
    tokenizer, model = opened.tokenizer(), load_float32(opened)
    sequences, length = options.calibration
    unseen = sequences // 2
    rows = windows("builtin:calibration", tokenizer, sequences + unseen, length, seed=0)
    texts = {text: windows(text, tokenizer, *options.heldout, 0) for text in options.texts}
    for granularity in ("attention", "block", "mlp", "joint"):
        if not getattr(options, granularity):
            continue
        units = find_units(model, granularity)
        tables = {
            kind: collect(
                model, rows[:sequences], parts=units.to_score(model, kind), scorers=SCORERS
            )
            for kind in units.kinds
        }
        for drop in getattr(options, granularity):
            budget = Budget.of_units(units.free(), drop)
            sets = chosen(model, units, budget, rows[:sequences], rows[sequences:], tables, options)
            distinct = [frozenset[Any](), *dict.fromkeys(sets.values())]
            losses = {}
            for text, tokens in texts.items():
                loss = RemovalLoss(model, tokens, parts=units.parts, metric="perplexity")
                losses[text] = dict(zip(distinct, loss.by_sequence(distinct), strict=True))
            whole = [math.exp(np.mean(text[frozenset()])) for text in losses.values()]
            print(f"### {granularity}, {drop} of {units.blocks * len(units.kinds)}\n")
            print(f"| rule | removed | {' | '.join(losses)} |\n|---|---|{'---|' * len(losses)}")
            print(f"| whole model | | {' | '.join(f'{value:.2f}' for value in whole)} |")
            report(sets, losses)


if __name__ == "__main__":
    main()
