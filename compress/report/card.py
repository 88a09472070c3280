"""The model card: what the hub shows, with machine-readable results, above the original card."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.report import pruning_words, quantization_words, tokens_words, wording
from compress.report.canvas import Plot
from compress.report.facts import Facts
from compress.report.values import items, text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from jinja2 import Template
    from markupsafe import Markup

_BEGIN = "<!-- entropress report: begin. The next report replaces what follows, up to its end. -->"
_END = "<!-- entropress report: end -->"
_KEPT = (
    *("license", "license_name", "license_link", "language", "pipeline_tag", "library_name"),
    *("base_model", "base_model_relation", "datasets"),
)
_TAGS = (
    *("entropress", "compressed", "lossless", "near-lossless"),
    *("entropy-coded", "pruned", "quantized", "token-pruned"),
)


def model_card(facts: Facts, plots: Mapping[str, Plot]) -> bytes:
    """A README.md, UTF-8: YAML head, our part between two marks, then the original card's text.

    The original is `Facts.card`; of a card of ours, what stands outside the marks. License,
    language, kind of model, tags and datasets are carried over from its head; results are not,
    since they are another model's.
    """
    from huggingface_hub import ModelCardData

    head, original = _split(facts.card or "")
    part = _template().render(
        facts=facts,
        plots=plots,
        words=wording,
        pruned=pruning_words,
        quantized=quantization_words,
        token_words=tokens_words,
        judgement=wording.judgement(facts),
    )
    members = _head(facts, head)
    if results := _results(facts, head):
        members |= {"model_name": facts.name, "eval_results": results}
    data = ModelCardData(**members)
    title = "# Original model card\n\n" if original else ""
    body = f"{_BEGIN}\n\n{part.strip()}\n\n{title}{_END}\n"
    whole = f"---\n{data.to_yaml()}\n---\n\n{body}" + (f"\n{original}\n" if original else "")
    return whole.encode("utf-8", "replace")


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # which escapes for HTML; `_escaped` does for Markdown
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["fenced"] = _fenced
    return environment.get_template("card.md.j2")


def is_ours(card: str) -> bool:
    """Whether a report wrote this card."""
    begin = card.find(_BEGIN)
    return begin >= 0 and card.find(_END, begin) >= 0


def _split(card: str) -> tuple[dict[str, Any], str]:
    """A card's head, empty where there is none that can be read, and its text without our part."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    card = card.replace("\r\n", "\n")
    head: Any = {}
    if match := REGEX_YAML_BLOCK.search(card):
        try:
            head = yaml.safe_load(match[2])
        except (yaml.YAMLError, ValueError, RecursionError):
            head = None
        if isinstance(head, dict):
            card = card[match.end() :]
    if is_ours(card):
        before, _, rest = card.partition(_BEGIN)
        card = before + rest.partition(_END)[2]
    return head if isinstance(head, dict) else {}, card.strip()


def _head(facts: Facts, before: Mapping[str, Any]) -> dict[str, Any]:
    """The members of the card's head but for the results."""
    ours = ["entropress", "compressed", wording.kind(facts)]
    ours += ["entropy-coded"] * facts.coded + ["pruned"] * bool(facts.removed)
    ours += ["quantized"] * bool(facts.quantization)
    ours += ["token-pruned"] * bool(facts.token_pruning)
    tags = [tag for tag in items(before.get("tags")) if isinstance(tag, str) and tag not in _TAGS]
    kept = {key: value for key in _KEPT if _is_plain(value := before.get(key))}
    head = {"library_name": "transformers"} | kept
    if wording.is_hub(facts):
        head |= {"base_model": facts.source, "base_model_relation": "quantized"}
    return head | {"tags": list(dict.fromkeys([*tags, *ours]))}


def _results(facts: Facts, head: Mapping[str, Any]) -> list[EvalResult]:
    """This model's own figures on tasks and texts, as the hub's model index has them."""
    from huggingface_hub import EvalResult

    found = []
    for gate in facts.gates:
        for row in gate.rows:
            if gate.name not in ("lm_eval", "perplexity") or row.candidate is None:
                continue
            if gate.name == "lm_eval":
                dataset, _, metric = row.name.partition(" ")
            else:
                dataset, metric = text(gate.config.get("data")) or "held-out text", "perplexity"
            found.append(
                EvalResult(
                    task_type=text(head.get("pipeline_tag")) or "text-generation",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_args={"documents": row.documents} if row.documents else None,
                    metric_type=metric or "score",
                    metric_name=metric or "score",
                    metric_value=float(f"{row.candidate:.6g}"),
                )
            )
    return found


def _is_plain(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(entry, str) and entry for entry in texts)


def _escaped(value: Any) -> str:
    """Any value as text on one line that Markdown and HTML take for nothing but text."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return str(value)
    line = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)


def _fenced(code: str, language: str = "") -> Markup:
    """A code block, between more backticks than it holds."""
    from markupsafe import Markup

    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    code = code.strip("\n").replace("<!--", "<! --")  # so that no mark of ours is in it
    return Markup(f"{fence}{language}\n{code}\n{fence}")
