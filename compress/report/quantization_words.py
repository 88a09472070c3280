"""Sentences about quantization that page and card share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compress.report.pruning_words import units
from compress.report.quantization import Fold, LevelSearch, Quantization, RateSearch, Training
from compress.report.values import members, number, text
from compress.report.wording import figure

_REASONS = 4  # that a sentence gives
_NAMES = 200  # that a list gives
_OUTSIDE = 4
MOST_REASONS = 50


def tile(found: Quantization) -> tuple[str, str, str]:
    """What quantized layers take, and what that counts."""
    if found.bits is None:
        return "Quantized", _layers(len(found.layers)), _method(found)
    return "Quantized layers", figure(found.bits), _measure(found)


def sentences(found: Quantization) -> list[str]:
    """What was done and how well it went, the unwelcome included."""
    return list(_sentences(found))


def named(names: list[str]) -> str:
    """A list of names, cut where it is endless."""
    more = f" and {len(names) - _NAMES:,} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def _sentences(found: Quantization) -> Iterator[str]:
    weights = f" ({found.weights / 1e6:,.1f} M weights)" if found.weights else ""
    rate = f"; {figure(found.bits)} {_measure(found)}" if found.bits is not None else ""
    into = f", into a {found.format} checkpoint" if found.format else ""
    yield f"{_layers(len(found.layers))}{weights} quantized by {_method(found)}{into}{rate}."
    if found.split:
        parts = ", ".join(f"{name} {figure(bits)}" for name, bits in found.split.items())
        yield f"Bits per weight by what takes them: {parts}."
    yield from _noise(found)
    if found.skipped:
        yield f"Skipped: {_counted(found.skipped)}."
    if bits := number(members(found.config.get("activations")).get("bits")):
        yield f"Inputs of quantized layers are rounded to {figure(bits)} bits while the model runs."
    if found.fold:
        yield _fold(found.fold)
    if found.rate_search:
        yield _rate_search(found.rate_search)
    if found.level_search:
        yield _level_search(found.level_search)
        yield f"Left out by the search: {units(found.dropped)}."
    if found.training:
        yield from _training(found.training)


def _method(found: Quantization) -> str:
    """What the recipe says of the weights; what it leaves open is not guessed."""
    weights = members(found.config.get("weights"))
    options = ", ".join(_options(weights))
    method = text(weights.get("method"), 100) or "an unknown method"
    return f"{method} ({options})" if options else method


def _options(weights: dict[str, Any]) -> Iterator[str]:
    if (target := number(weights.get("bits_per_weight"))) is not None:
        yield f"{figure(target)} bits per weight asked"
    if (limit := number(weights.get("max_perplexity_ratio"))) is not None:
        yield f"perplexity at most {figure(limit)} times that of the model itself asked"
    if (bits := number(weights.get("bits"))) is not None:
        yield f"{figure(bits)} bits"
    if group := text(weights.get("group"), 100):
        yield "by row" if group == "row" else f"by groups of {group}"
    if isinstance(symmetric := weights.get("symmetric"), bool):
        yield "symmetric" if symmetric else "asymmetric"
    if weights.get("double_quant") is True:
        yield "its scales quantized too"


def _measure(found: Quantization) -> str:
    kind = "coded bits per weight" if found.coded else "bits per weight as stored"
    return f"{kind}, scales included"


def _noise(found: Quantization) -> Iterator[str]:
    known = [(layer.sqnr, layer.name) for layer in found.layers if layer.sqnr is not None]
    if known:
        mean = sum(value for value, _ in known) / len(known)
        worst, name = min(known)
        yield (
            "Signal to quantization noise (SQNR) of the weights: "
            f"{figure(mean)} dB, the mean over layers; least {figure(worst)} dB, {name}."
        )
    outside = [layer for layer in found.layers if layer.block is None]
    if outside:
        said = [f"{layer.name} ({figure(layer.bits)} bits)" for layer in outside[:_OUTSIDE]]
        more = f" and {len(outside) - _OUTSIDE:,} more" if len(outside) > _OUTSIDE else ""
        yield f"Outside the blocks: {', '.join(said)}{more}."


def _counted(skipped: dict[str, list[str]]) -> str:
    """``31 layers: ignored by the recipe (30); tied to the embeddings (1)``."""
    parts = [f"{reason} ({len(names):,})" for reason, names in skipped.items()]
    rest = f"; {len(parts) - _REASONS:,} more reasons" if len(parts) > _REASONS else ""
    total = sum(map(len, skipped.values()))
    return f"{_layers(total)}: {'; '.join(parts[:_REASONS])}{rest}"


def _fold(fold: Fold) -> str:
    into = "layers" if fold.layers is None else _layers(fold.layers)
    missed = f"; not into {_counted(fold.skipped)}" if fold.skipped else ""
    return f"Scales of inputs folded into {into}, alpha {figure(fold.alpha)}{missed}."


def _rate_search(search: RateSearch) -> str:
    limit, ratio = search.limit, search.ratio
    over = limit is not None and ratio is not None and ratio > limit
    return (
        "Search of the least rate whose perplexity on the search text is at most "
        f"{figure(limit)} times that of the model itself: {figure(ratio)} times, found in "
        f"{len(search.trials)} trials{', which is more than was allowed' * over}."
    )


def _level_search(search: LevelSearch) -> str:
    said = (
        f"Search of a step for each part of a block: KL {figure(search.start)} → "
        f"{figure(search.found)} nats a token on the search text, from no differences"
    )
    if search.start is not None and search.found is not None and search.found >= search.start:
        return f"{said}; it found nothing better."
    if len(search.unseen) == 2:
        found, start = map(figure, search.unseen)
        said += f"; on text that it did not see {start} → {found}"
        if search.unseen[0] >= search.unseen[1]:
            return f"{said}, so that it was not used."
    return f"{said}."


def _training(training: Training) -> Iterator[str]:
    by = f", cut by {training.partition}" if training.partition else ""
    windows = f" in {len(training.windows)} windows of blocks{by}" if training.windows else ""
    steps = f", {len(training.history):,} steps" if training.history else ""
    yield (
        f"Trained: {training.mode or 'in an unknown way'}{windows}{steps}. An untrained model was "
        "not measured beside it: nothing here says how much training helped."
    )
    if training.oscillation is not None:
        yield (
            f"{figure(100 * training.oscillation)} % of the codes still went to and fro in the "
            "last steps of training."
        )
    if training.literal:
        yield "The guides of the training are as the paper prints them, which harms."


def _layers(count: int) -> str:
    return f"{count:,} layer{'s' * (count != 1)}"
