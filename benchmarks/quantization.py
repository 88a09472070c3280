"""Quantized weights beside each other, and trained ones: `python benchmarks/quantization.py`.

A language model on held-out documents, a sentence encoder on held-out sentences; all linear layers
but a tied head are quantized. Then the same language model with weights of 4 bits by row and inputs
of 8 by token, trained window by window. All bits count what belongs to the quantized matrices
(`Subject.cost`). Intervals are of 95 %, over documents or sentences in pairs (BCa bootstrap).
What was measured is kept in `--journal`, so that a run can be taken up again; a change of the code
asks for another. Names for `--only` are `decoder/ROW`, `encoder/ROW` and `edgeqat/ROW`.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from codec import processor
from quantization_measures import Decoder, Encoder, Found, Kept, Row, Subject

from compress import __version__, checkpoint, codec
from compress.evaluate import Documents, read_documents
from compress.prune import block_count
from compress.quant import Rate, Scheme, quantize_rtn
from compress.signals import load_text, windows

INT4, INT3 = "int4 g64 asym", "int3 g64 asym"
LESS = "ECSQ, 10 % below int4 g64 asym"
ROWS = {
    "int8 row": Row(Scheme(8, None, True)),
    "int4 g64": Row(Scheme(4, 64, True)),
    INT4: Row(Scheme(4, 64, False)),
    "int4 row": Row(Scheme(4, None, True)),
    INT3: Row(Scheme(3, 64, False)),
    **{f"ECSQ {rate}": Row(rate=rate, rival=INT4) for rate in (4.3, 4.05, 3.8, 3.6)},
    LESS: Row(rival=INT4, share=0.9),
    f"{LESS} coded": Row(rival=INT4, share=0.9, counted="coded"),
    "ECSQ, int3 g64 asym": Row(rival=INT3),
    "ECSQ, int3 g64 asym coded": Row(rival=INT3, counted="coded"),
}
# By what errors cost a language model's predictions, on calibration text.
SENSITIVE = {
    f"{name}, sensitivity": replace(row, sensitivities=True)
    for name, row in ROWS.items()
    if name.startswith((LESS, "ECSQ, int3", "ECSQ 3.8", "ECSQ 4.3"))
}
EVERY = ROWS | SENSITIVE
UNTRAINED, CORRECTED, BY_ENTROPY = "untrained", "guides corrected", "windows by entropy"
TRAININGS: dict[str, dict[str, Any]] = {
    CORRECTED: {},
    "guides as printed": {"paper_literal": True},
    "no guides": {"attention": 0.0, "entropy": 0.0},
    BY_ENTROPY: {},  # and corrected guides
}
QUICK = {
    "length": 64,
    "documents": 10,
    "each": 1,
    "sentences": 20,
    "steps": 2,
    "batch": 1,
    "sequences": 4,
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    print(f"{processor()}; {options.threads} threads, torch {torch.__version__},")
    print(f"{codec.backend()}, entropress {__version__}; models computed in float32\n")
    wanted = {
        kind: [row for row in rows if fnmatchcase(f"{kind}/{row}", options.only)]
        for kind, rows in {
            "decoder": EVERY,
            "encoder": ROWS,
            "edgeqat": [UNTRAINED, *TRAININGS],
        }.items()
    }
    if wanted["decoder"] or wanted["edgeqat"]:
        subject = decoder(options)
        if wanted["decoder"]:
            weights_table(subject, wanted["decoder"])
        if wanted["edgeqat"]:
            training_table(subject, wanted["edgeqat"], options)
    if wanted["encoder"]:
        weights_table(encoder(options), wanted["encoder"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--encoder", default="demo:minilm")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="as in 'decoder/int4*'")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--each", type=int, default=1000, help="windows of a document at most")
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--sequences", type=int, default=16, help="windows to calibrate and train")
    parser.add_argument("--steps", type=int, default=30, help="of each window of blocks")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4, help="of a window of blocks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="all of it, on little; says nothing")
    parser.add_argument("--journal", type=Path, default=Path("out/quantization"))
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


def decoder(options: argparse.Namespace) -> Decoder:
    subject, tokenizer = prepared(options.model, options)
    read = read_documents(
        "builtin:heldout", tokenizer, length=options.length, limit=options.documents
    )
    kept = [
        (owner, window)
        for place, (owner, window) in enumerate(read)
        if place - read.owners.index(owner) < options.each
    ]
    owners, parts = map(list, zip(*kept, strict=True))
    documents = Documents(parts, owners, read.count)
    print(f"### {options.model}\n\n{documents.count} documents of builtin:heldout, ", end="")
    print(f"{documents.tokens} tokens in windows of {options.length}\n")
    return Decoder(*subject, documents=documents)


def encoder(options: argparse.Namespace) -> Encoder:
    subject, _ = prepared(options.encoder, options)
    text = " ".join(" ".join(load_text("builtin:heldout")).split())
    found = [part for part in re.split(r"(?<=[.!?]) ", text) if 40 <= len(part) <= 200]
    sentences = random.Random(0).sample(sorted(set(found)), options.sentences)
    print(f"### {options.encoder}\n\n{len(sentences)} sentences of builtin:heldout\n")
    return Encoder(*subject, sentences=sentences)


def prepared(model: str, options: argparse.Namespace) -> tuple[tuple[Any, ...], Any]:
    """What a `Subject` is made of, and the tokenizer."""
    opened = checkpoint.open(checkpoint.resolve(model))
    tokenizer = opened.tokenizer()
    tokens = windows("builtin:calibration", tokenizer, options.sequences, options.length, seed=0)
    kept = Kept(options.journal, [opened.fingerprint, __version__, options.threads])
    return (opened, EVERY, kept, tokens), tokenizer


def weights_table(subject: Subject, names: list[str]) -> None:
    """A line a row, then one for each row that has a rival, where both were asked for."""
    print("| weights | bits stored | coded | saves | exported and coded | SQNR dB | ", end="")
    print(f"{subject.head} |\n|---|---|---|---|---|---|{'---|' * (subject.head.count('|') + 1)}")
    for name in names:
        cost = subject.cost(name)
        print(
            f"| {name} | {cost['fixed']:.3f} | {cost['coded']:.3f} "
            f"| {1 - cost['coded'] / cost['fixed']:.1%} | {cost['exported']:.3f} "
            f"| {cost['sqnr']:.1f} | {subject.quality(subject.result(name))} |",
            flush=True,
        )
    if not any(EVERY[name].rival in names for name in names):
        return
    print(
        "\nThe row's bits, coded, beside the rival's: as classical formats store those, coded too, "
    )
    print("and both as exported and coded; then the row's quality beside the rival's.\n")
    print(f"| row | rival | stored | coded | exported | {subject.compared} |")
    print(f"|---|---|---|---|---|{'---|' * (subject.compared.count('|') + 1)}")
    for name in names:
        rival = EVERY[name].rival
        if rival not in names:
            continue
        own, other = subject.cost(name), subject.cost(rival)
        shares = (
            f"{own[mine] / other[theirs] - 1:+.1%}"
            for mine, theirs in (("coded", "fixed"), ("coded", "coded"), ("exported", "exported"))
        )
        compared = subject.against(subject.result(name), subject.result(rival))
        print(f"| {name} | {rival} | {' | '.join(shares)} | {compared} |", flush=True)
    print()


def training_table(subject: Decoder, names: list[str], options: argparse.Namespace) -> None:
    """Weights of 4 bits by row, inputs of 8 by token; pairs against what is named."""
    found = {}
    print(
        f"Trained on {options.sequences} windows of {options.length} tokens, {options.steps} ",
        end="",
    )
    print(f"steps of {options.batch} for {options.blocks} blocks at a time\n")
    print(
        "| W4 by row, A8 by token | windows | coded | error at the end | codes that swing ", end=""
    )
    print(f"| {subject.head} |\n|---|---|---|---|---|---|---|---|")
    for name in names:
        found[name] = each = trained(subject, name, options)
        print(
            f"| {name} | {' '.join(map(str, each['sizes']))} | {each['coded']:.3f} "
            f"| {each['error']} | {each['swing']} | {subject.quality(each)} |",
            flush=True,
        )
    pairs = [
        (name, rival)
        for rival in (UNTRAINED, CORRECTED)
        for name in TRAININGS
        if name != rival and {name, rival} <= found.keys()
    ]
    if pairs:
        print(f"\n| trained | against | {subject.compared} |\n|---|---|---|---|")
    for name, rival in pairs:
        print(f"| {name} | {rival} | {subject.against(found[name], found[rival])} |")
    print()


def trained(subject: Decoder, name: str, options: argparse.Namespace) -> Found:
    """What comes of a training, or of its start, "untrained"."""
    from compress.quant import (
        QatSettings,
        block_entropies,
        entropy_windows,
        train_blockwise,
        uniform_windows,
    )

    opened, tokens = subject.opened, subject.calibration
    scheme = Scheme(4, None, True)
    start = {
        weight: quantize_rtn(opened.read(weight), scheme, subject.scale_dtype, name=weight)
        for weight in subject.names
    }
    settings = QatSettings(
        steps=options.steps,
        batch=options.batch,
        scale_dtype=str(subject.scale_dtype).removeprefix("torch."),
        **TRAININGS.get(name, {}),
    )
    parts = uniform_windows(block_count(opened.config), options.blocks)
    if name == BY_ENTROPY:
        entropies = subject.kept(
            "block entropies", list(tokens.shape), lambda: block_entropies(subject.whole, tokens)
        )
        parts = entropy_windows(entropies, options.blocks)
    depends = [] if name == UNTRAINED else [asdict(settings), list(tokens.shape), str(parts)]

    def work() -> Found:
        found: Found = {"error": "", "swing": "", "sizes": []}
        weights = start
        if name != UNTRAINED:
            done = train_blockwise(
                subject.whole,
                tokens,
                dict.fromkeys(subject.names, scheme),
                settings,
                parts,
                activations=8,
                start=start,
                journal=subject.kept.path(f"training {name}", depends),
                subject=opened.fingerprint,
            )
            weights = dict(done.weights)
            found["error"] = f"{done.errors[-1]:.4f}"
            found["swing"] = f"{statistics.fmean(done.oscillation.values()):.2%}"
            found["sizes"] = [len(part) for part in parts]
        rates = (weights[weight].rate() for weight in subject.names)
        found["coded"] = sum(rates, Rate()).bits_per_weight
        with subject.holding(weights.__getitem__, activations=8):
            return found | subject.measure()

    return subject.kept(f"edgeqat {name}", [depends, subject.texts], work)


if __name__ == "__main__":
    main()
