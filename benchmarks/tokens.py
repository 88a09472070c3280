"""Prompts that lose visual tokens: `python benchmarks/tokens.py --toy DIR --vlm DIR`.

The models are those of `vlm/toy.py` and `vlm/train.py`, asked about held-out examples; without
one of them, its parts are left out. "random" is the mean over `--draws` draws for each image.
Intervals are of 95 %, over examples: of accuracies by BCa bootstrap, of differences in pairs
(against the whole model's answers Tango's, against the mean over draws Student's). Times are the
least of `--repeats` runs and shown as ratios.
What was measured is kept in `--journal`, so that a run can be taken up again; a change of the code
asks for another. Parts for `--only` are `toy/PART`, `vlm/PART` and `random/PART`, of accuracy,
entropies, choice, flops, time and scoring.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codec import processor
from quantization_measures import Found, Kept
from tokens_measures import RANDOM, WHOLE, Subject, toy_subject, vlm_subject
from tokens_plot import plot
from tokens_speed import Prompt, enlarged, flops, random_llava, scoring, speeds

from compress import __version__, checkpoint
from compress.evaluate import bootstrap_interval, compare
from compress.tokens import SELECTORS, TokenPolicy

KEEPS = (0.0625, 0.125, 0.25, 0.5)


@dataclass(frozen=True)
class Setting:
    """Before which layer tokens go, how many of them stay, and of how many examples; at which of
    these shares a selector is chosen as the stage chooses it."""

    layer: int
    keeps: tuple[float, ...]
    examples: int
    chosen: tuple[float, ...]


SETTINGS = {
    "toy": (Setting(1, KEEPS, 400, KEEPS), Setting(2, KEEPS, 400, KEEPS)),
    "vlm": (
        Setting(2, KEEPS, 200, (0.0625, 0.25)),
        Setting(12, (0.0625, 0.125), 100, (0.0625,)),  # where the entropy collapses
    ),
}
LAYER = 2  # where times are measured
TIMED = {WHOLE: None} | {f"{keep:g}": TokenPolicy(LAYER, keep, "logdet") for keep in (0.25, 0.125)}
PARTS = ("accuracy", "entropies", "choice", "flops", "time", "scoring")
QUICK = {"examples": 12, "calibration": 20, "draws": 2, "repeats": 1, "steps": 2}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    print(f"{processor()}; {options.threads} threads, torch {torch.__version__},")
    print(f"entropress {__version__}; models computed in float32\n")
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for kind, make in (("toy", toy_subject), ("vlm", vlm_subject)):
        path = getattr(options, kind)
        if path is None or not any(wanted(kind, part, options) for part in PARTS):
            continue
        subject = make(path, kept(checkpoint.open(path).fingerprint, options))
        print(f"## {kind}: {path.name}\n")
        measure(kind, subject, options, curves)
    if any(wanted("random", part, options) for part in ("flops", "time", "scoring")):
        print("## random: 576 visual tokens and 75 others, 12 layers of 512\n")
        costs("random", [random_llava()], kept("random", options), options)
    if options.plot and curves:
        plot(curves, options.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", type=Path, metavar="DIR", help="what vlm/toy.py wrote")
    parser.add_argument("--vlm", type=Path, metavar="DIR", help="what vlm/train.py trained")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="as in 'toy/*'")
    parser.add_argument("--examples", type=int, default=400, help="held-out, at most")
    parser.add_argument("--calibration", type=int, default=32, help="examples to choose by")
    parser.add_argument("--draws", type=int, default=5, help="of random tokens for each image")
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed")
    parser.add_argument("--steps", type=int, default=8, help="tokens to decode")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="all of it, on little; says nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG or PNG, of accuracies")
    parser.add_argument("--journal", type=Path, default=Path("out/tokens"))
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


def kept(mark: str, options: argparse.Namespace) -> Kept:
    return Kept(options.journal, [mark, __version__, options.threads])


def wanted(kind: str, part: str, options: argparse.Namespace) -> bool:
    return fnmatchcase(f"{kind}/{part}", options.only)


def measure(kind: str, subject: Subject, options: argparse.Namespace, curves: Any) -> None:
    settings = [
        replace(one, examples=min(one.examples, options.examples)) for one in SETTINGS[kind]
    ]
    if wanted(kind, "entropies", options):
        entropies(subject, options)
    for setting in settings:
        if wanted(kind, "accuracy", options):
            title = f"{kind}, before layer {setting.layer}"
            curves[title] = accuracies(subject, setting, options)
    if wanted(kind, "choice", options):
        choices(subject, settings, options)
    one = subject.ask(1, "heldout", 0)
    prompts = [Prompt(subject.model, one.ids[0], one.pixels.shape[-1])]
    if kind == "vlm":
        prompts.append(enlarged(subject.model, one.ids[0], 2 * one.pixels.shape[-1]))
    costs(kind, prompts, subject.kept, options)


def entropies(subject: Subject, options: argparse.Namespace) -> None:
    found = subject.entropies(options.calibration)
    listed = " ".join(f"{mean:.3f}" for mean in found["means"])
    where = "none" if found["layer"] is None else found["layer"]
    print(f"Entropy of visual tokens by layer: {listed}\nEntropy Collapse Layer: {where}\n")


def accuracies(
    subject: Subject, setting: Setting, options: argparse.Namespace
) -> dict[str, dict[float, float]]:
    """Tables of one layer; returns the accuracies by selector and share of tokens kept."""
    whole = subject.answers(setting.examples, None, 1)["right"]
    curves: dict[str, dict[float, float]] = {WHOLE: {1.0: float(np.mean(whole))}}
    print(f"### Before layer {setting.layer}, {setting.examples} held-out examples\n")
    print(f"Whole model: {accuracy(whole)}\n")
    for keep in setting.keeps:
        print(f"| {keep:g} of the tokens | accuracy | minus random | minus whole | digit kept |")
        print("|---|---|---|---|---|")
        chance: Sequence[float] = ()
        for name in sorted(SELECTORS, key=lambda name: name != RANDOM):
            policy = TokenPolicy(setting.layer, keep, name)
            found = subject.answers(setting.examples, policy, options.draws)
            chance = chance or found["right"]
            beside = "" if name == RANDOM else gain(chance, found["right"])
            print(
                f"| {name} | {accuracy(found['right'])} | {beside} "
                f"| {gain(whole, found['right'])} | {np.mean(found['shown']):.2f} |",
                flush=True,
            )
            curves.setdefault(name, {})[keep] = float(np.mean(found["right"]))
        print()
    return curves


def accuracy(right: Sequence[float]) -> str:
    found = bootstrap_interval(np.mean, [np.array(right)])
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def gain(reference: Sequence[float], candidate: Sequence[float]) -> str:
    drop = compare(reference, candidate, higher_is_better=True).drop
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(
        *(0 - x for x in (drop.estimate, drop.high, drop.low))
    )


def choices(subject: Subject, settings: Sequence[Setting], options: argparse.Namespace) -> None:
    """What the stage `prune_tokens` would choose, and the held-out accuracy of that."""
    print(f"Chosen as by the stage, on {options.calibration} training examples; KL in nats a token")
    print("\n| layer | kept | chosen | KL | random | less than random | next | accuracy ", end="")
    print("| best of all | random |\n|---|---|---|---|---|---|---|---|---|---|")
    for setting in settings:
        for keep in setting.chosen:
            policy = TokenPolicy(setting.layer, keep, RANDOM)
            found = subject.choice(options.calibration, policy, options.draws)
            chosen, losses = found["chosen"], found["losses"]
            second = sorted(set(losses) - {RANDOM, chosen}, key=losses.__getitem__)[0]
            estimate, low, high = found["less"]
            right = {}
            for name in SELECTORS:
                rival = replace(policy, selector=name)
                answers = subject.answers(setting.examples, rival, options.draws)
                right[name] = float(np.mean(answers["right"]))
            best = max(right, key=right.__getitem__)
            print(
                f"| {setting.layer} | {keep:g} | {chosen} | {losses[chosen]:.4f} "
                f"| {losses[RANDOM]:.4f} | {estimate:.4f} [{low:.4f}, {high:.4f}] "
                f"| {second} {losses[second]:.4f} | {right[chosen]:.3f} "
                f"| {best} {right[best]:.3f} | {right[RANDOM]:.3f} |",
                flush=True,
            )
    print()


def costs(kind: str, prompts: Sequence[Prompt], known: Kept, options: argparse.Namespace) -> None:
    for prompt in prompts:
        size = [prompt.tokens, len(prompt.ids)]
        if wanted(kind, "flops", options):
            operations(prompt, known, size)
        if wanted(kind, "time", options) and kind != "toy":
            times(prompt, known, size, options)
        if wanted(kind, "scoring", options) and kind != "toy":
            overheads(prompt, known, size, options)


def operations(prompt: Prompt, known: Kept, size: list[int]) -> None:
    policies = {WHOLE: None} | {
        f"{keep:g}, {name}": TokenPolicy(LAYER, keep, name)
        for name in ("uniform", "logdet")
        for keep in KEEPS
    }
    found = {
        name: known(f"flops {name}", size, lambda policy=policy: flops(prompt, policy))
        for name, policy in policies.items()
    }
    predicted, counted = found[WHOLE]
    print(f"Operations of {size[0]} visual tokens and {size[1] - size[0]} others in the language ")
    print(f"model; what is counted includes the selection, before layer {LAYER}\n")
    print("| kept | predicted, of whole | counted, of whole | counted / predicted − 1 |")
    print("|---|---|---|---|")
    for name, (formula, count) in found.items():
        shares = f"{formula / predicted:.2%} | {count / counted:.2%}"
        print(f"| {name} | {shares} | {count / formula - 1:+.2%} |")
    print(flush=True)


def times(prompt: Prompt, known: Kept, size: list[int], options: argparse.Namespace) -> None:
    settings = [size, LAYER, options.repeats, options.steps]
    print(f"{size[0]} visual tokens and {size[1] - size[0]} others, logdet before layer {LAYER}; ")
    print("whole / pruned by processor time, and by wall time\n")
    print("| kept | batch | prefill | first token, with the vision tower | decode | cache bytes |")
    print("|---|---|---|---|---|---|")
    for rows in (1, 8):
        found: Found = known(
            f"times batch {rows}",
            settings,
            lambda rows=rows: speeds(prompt, TIMED, rows, options.repeats, options.steps),
        )
        whole = found[WHOLE]
        for name in [name for name in TIMED if name != WHOLE]:
            own = found[name]
            ratios = (
                f"{whole[f'{key} cpu'] / own[f'{key} cpu']:.2f}, {whole[key] / own[key]:.2f}"
                for key in ("prefill", "first", "decode")
            )
            bytes_ = f"{own['bytes'] / whole['bytes']:.1%}"
            print(f"| {name} | {rows} | {' | '.join(ratios)} | {bytes_} |", flush=True)
    print()


def overheads(prompt: Prompt, known: Kept, size: list[int], options: argparse.Namespace) -> None:
    keep = 0.25
    found: Found = known(
        "scoring",
        [size, LAYER, keep, options.repeats],
        lambda: scoring(prompt, LAYER, keep, options.repeats),
    )
    print(f"Processor time of the choice of {keep:g} of {size[0]} tokens, batch 1\n")
    print("| selector | of the whole prefill | of the pruned one |\n|---|---|---|")
    for name, shares in found.items():
        print(f"| {name} | {shares['whole']:.1%} | {shares['pruned']:.1%} |")
    print(flush=True)


if __name__ == "__main__":
    main()
