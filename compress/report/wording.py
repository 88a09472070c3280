"""Numbers and sentences that page and card share."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.report.facts import Facts
    from compress.report.gates import Gate, Row

PARTS = {"attention": "attention", "mlp": "MLP"}  # of a block, in words
_RECIPE_ORDER = ("version", "model", "calibration", "stages", "gates")
_HEADS = "CausalLM|MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering"


def figure(value: float | None, unknown: str = "–") -> str:
    """A number to four significant digits, integers and large ones in full."""
    if value is None:
        return unknown
    whole = isinstance(value, int) or abs(value) >= 1000
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """An interval whose unknown ends are infinite."""
    return f"[{figure(low, '−∞')}, {figure(high, '∞')}]"


def size(nbytes: int) -> str:
    """Bytes in decimal units: ``160.3 MB``."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:,.1f} {units[0]}"


def measured(gate: Gate, row: Row) -> str:
    """What a row found: ``1.257 [1.21, 1.31]``, or ``0 of 272`` where differences are counted."""
    if row.value is None:
        return "–"
    if gate.exact:
        return f"{figure(row.value)} of {figure(row.documents)} differ"
    return " ".join(filter(None, (figure(row.value), row.unit, interval(row.low, row.high))))


def at_most(row: Row) -> str:
    return "–" if row.limit is None else f"≤ {figure(row.limit)}"


def kind(facts: Facts) -> str:
    """The class of the outcome."""
    return "lossless" if facts.lossless else "near-lossless"


def headline(facts: Facts) -> str:
    """What came out, in one line."""
    after = size(facts.total.stored_nbytes)
    if facts.bytes_before:
        share = facts.total.stored_nbytes / facts.bytes_before
        after = f"{size(facts.bytes_before)} → {after} ({share:.1%})".replace("%", " %")
    return f"{facts.source}: {after}, {kind(facts)}; {_gates_passed(facts.gates)}"


def judgement(facts: Facts) -> tuple[str, str]:
    """The overall verdict as a title and a sentence that claims no more than was checked."""
    if facts.gates:
        title, sentence = _SAID[facts.verdict]
        some = sum(gate.verdict == facts.verdict for gate in facts.gates)
        return title.format(share=f"{some} of {len(facts.gates)}"), sentence
    if facts.lossless:
        return "Not gated", (
            "No gate ran. By its class no stage may change a bit of the weights; "
            "`entropress verify --against` checks that they did not."
        )
    return "Not gated", "No gate ran: nothing here says how well this model still works."


_SAID = {
    "failed": ("Failed: {share} gates", "This model does not keep what its recipe asks."),
    "undecided": (
        "Undecided: {share} gates",
        "The measurements do not suffice to say that it is as good as its recipe asks. "
        "That is not a pass.",
    ),
    "pending": ("Not checked yet: {share} gates", "The run ended before they were checked."),
    "passed": (
        "Passed: {share} gates",
        "Each holds for what it measured, at the confidence it states.",
    ),
}


def recipe_yaml(facts: Facts) -> str:
    """The resolved recipe as a YAML file that reads back as the same recipe."""
    import yaml

    known = [key for key in _RECIPE_ORDER if facts.recipe.get(key) not in (None, [])]
    ordered = {key: facts.recipe[key] for key in [*known, *sorted(facts.recipe.keys() - known)]}
    ordered = {key: value for key, value in ordered.items() if value not in (None, [])}
    return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def commands(facts: Facts) -> str:
    """The shell commands that make and check the same again, with the versions that made it."""
    extra = {"entropress": "[demo]"} if is_demo(facts) else {}
    pins = [
        f"{name}{extra.get(name, '')}=={version.partition('+')[0]}"
        for name, version in facts.versions.items()
    ]
    lines = [shlex.join(["pip", "install", *pins])] if pins else []
    source = [facts.source]
    if facts.revision and is_demo(facts):
        lines.append(shlex.join(["pip", "install", "--no-deps", facts.revision]))
    elif facts.revision:
        source += ["--revision", facts.revision]
    compress = ["entropress", "compress", "--recipe", "recipe.yaml", "--output-dir", "out"]
    lines.append(shlex.join([*compress, *source]))
    lines.append(shlex.join(["entropress", "verify", "--against", *source, "out"]))
    return "\n".join(lines)


def is_demo(facts: Facts) -> bool:
    """Whether the source is one of the embedded models, whose revision is a package."""
    return facts.source.startswith("demo:")


def is_hub(facts: Facts) -> bool:
    """Whether the source is a model of the Hugging Face hub; a directory has no revision."""
    named = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", facts.source, re.ASCII)
    return bool(named and facts.revision and re.fullmatch(r"[0-9a-f]{40}", facts.revision))


def loading(facts: Facts) -> str:
    """Python that loads the model."""
    head = re.search(f"For({_HEADS})$", facts.architecture)
    auto, reader = f"AutoModelFor{head[1]}" if head else "AutoModel", "Tokenizer"
    tokens = facts.token_pruning
    if tokens and tokens.target == "visual":
        auto, reader = "AutoModelForImageTextToText", "Processor"
    lines = [
        f"from transformers import {auto}, Auto{reader}",
        "",
        f"model = {auto}.from_pretrained({facts.name!r})",
        f"{reader.lower()} = Auto{reader}.from_pretrained({facts.name!r})",
    ]
    if tokens and not facts.coded:
        lines.insert(0, "from compress.tokens import attach_stored")
        lines.append("attach_stored(model)")
    return "\n".join(lines)


def limits(facts: Facts) -> list[str]:
    """What the report does not prove."""
    found = [
        "It repeats what the manifest says and measures sizes and entropies. It checks no hash and "
        "runs no gate again: `entropress verify` and `entropress eval` do.",
    ]
    if not facts.gates:
        found.append(
            "No gate ran, so no number here speaks of quality."
            if not facts.lossless
            else "No gate ran. That not a bit differs follows from the stages' design, and is "
            "proved by `entropress verify --against` the original."
        )
    if any(not gate.exact for gate in facts.gates):
        found.append(
            "A gate speaks of its own tasks, texts and metric, and of nothing else. Each interval "
            "has its own confidence; with many of them, some miss by chance."
        )
    if facts.prunings:
        found.append(
            "Scores and KLs of candidates are means over the calibration text. A low score does "
            "not say that a part is useless, only that the scorer would remove it first; what was "
            "the best of many on one text may not be so on another."
        )
    if facts.quantization:
        found.append(
            "Bits per weight of quantized layers count those layers alone, not what was skipped. "
            "SQNR is that of the weights, not of what the model says. Perplexities and KLs of "
            "searches were measured on the text that was searched on."
        )
        if facts.quantization.coded and not facts.coded:
            found.append("Coded bits are what `encode_weights` would come to: it did not run.")
    if facts.token_pruning:
        found.append(
            "Losses of selectors are KLs on calibration inputs, those of candidates on the half "
            "that one was chosen on: they do not say how many answers stay right. The operations "
            "counted are those of the decoder on a prompt: not the vision tower, not the choice of "
            "tokens, not what is generated afterwards. They are no measurement of time."
        )
        if any(gate.name != "lm_eval" for gate in facts.gates):
            found.append(
                "Gates other than lm_eval run the model on whole prompts: they say nothing about "
                "the pruning of tokens."
            )
        if not facts.coded:
            found.append(
                "Transformers alone loads this checkpoint and prunes no tokens: "
                "`compress.tokens.attach_stored(model)` does."
            )
    if facts.quantization and facts.quantization.coded:
        found.append(
            "Sizes are those on disk. Transformers makes dense weights of the codes as the model "
            "first runs: it then takes the memory of one that is not quantized, and is no faster. "
            "An engine with integer kernels may do better."
        )
    elif facts.coded:
        found.append(
            "Sizes are those on disk. Weights are decoded when the model is loaded: then it takes "
            f"{size(facts.total.nbytes)} of memory and runs as fast as the uncompressed one."
        )
    found.append("Entropies are of order 0: of single exponents, blind to any pattern among them.")
    return found


def _gates_passed(gates: list[Gate]) -> str:
    passed = sum(gate.verdict == "passed" for gate in gates)
    if not gates:
        return "no gate ran"
    return f"{passed} of {len(gates)} gate{'s' * (len(gates) > 1)} passed"
