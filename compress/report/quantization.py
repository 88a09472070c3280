"""What the quantization of a manifest says of itself, read as that of somebody else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.evaluate import kind
from compress.report.pruning import Removed, read_prunings, together
from compress.report.values import count, entries, items, members, number, numbers, text

PARTS = ("attention", "mlp")
_MOST_BLOCKS = 1024
_MOST_LAYERS = 1 << 16
_MOST_TRIALS = 200
_NUMBERED = re.compile(r"(?:(.+?)\.)?(\d{1,6})\.", re.ASCII)


@dataclass(frozen=True)
class Layer:
    """``kind``: what layers of one role share; ``block``: None outside the blocks; ``bits`` and
    ``sqnr``: None where unknown, and of layers that a search left out."""

    name: str
    kind: str
    block: int | None
    bits: float | None
    sqnr: float | None


@dataclass(frozen=True)
class Fold:
    """Scales moved from inputs into weights; ``skipped``: names by the reason why not there."""

    alpha: float | None
    layers: int | None
    skipped: dict[str, list[str]]


@dataclass(frozen=True)
class RateSearch:
    """The search of a rate for a perplexity. ``trials``: of each the rate and the ratio of
    perplexities, None where that was no number; ascending rates."""

    limit: float | None
    ratio: float | None
    trials: list[tuple[float, float | None]]


@dataclass(frozen=True)
class LevelSearch:
    """``start`` and ``found``: KLs in nats a token, of no differences and of those found;
    ``unseen``: of those found and of none, on text that the search did not see, or nothing;
    ``levels``: by part of a block by how many octaves its steps are wider than the common one, in
    the order of ``blocks``; None where it has none."""

    start: float | None
    found: float | None
    unseen: list[float]
    history: list[float]
    blocks: list[int]
    levels: dict[str, list[float | None]]


@dataclass(frozen=True)
class Training:
    """``windows``: of each the first and the last block; ``borders``: the steps with which the
    second and later ones began, none where unknown; ``entropies``: by block; ``errors``: behind the
    last block of each window that was trained; ``oscillation``: a share of the codes."""

    mode: str
    partition: str
    literal: bool
    windows: list[tuple[int, int]]
    borders: list[int]
    entropies: list[tuple[int, float]]
    history: list[float]
    errors: list[tuple[int, float]]
    oscillation: float | None


@dataclass(frozen=True)
class Quantization:
    """A `quantize` stage; blocks go by their numbers in the original model.

    ``bits``: per weight of the layers quantized, scales included; ``split``: those of codes, scales
    and zero points, by name. ``skipped``: names of layers by the reason why they were.
    """

    config: dict[str, Any]
    format: str
    bits: float | None
    weights: int | None
    split: dict[str, float]
    layers: list[Layer]
    skipped: dict[str, list[str]]
    fold: Fold | None
    rate_search: RateSearch | None
    level_search: LevelSearch | None
    training: Training | None
    dropped: Removed

    @property
    def coded(self) -> bool:
        """Whether its rates are those of coded codes; bitsandbytes' are as they are stored."""
        return self.format != "bitsandbytes"


def read_quantization(stages: Sequence[dict[str, Any]]) -> Quantization | None:
    """The last quantizing stage, since nothing is quantized twice; None without one.

    Its blocks are led back through the prunings before it.
    """
    places = [place for place, stage in enumerate(stages) if stage.get("stage") == "quantize"]
    if not places:
        return None
    stage = stages[places[-1]]
    gone = set(together(read_prunings(stages[: places[-1]])).get("block", []))
    alive = [block for block in range(_MOST_BLOCKS + len(gone)) if block not in gone]
    metrics = members(stage.get("metrics"))
    weights = count(metrics.get("weights"))
    search = members(metrics.get("search"))
    levels = _level_search(search, alive)
    dropped = _dropped(search.get("dropped"), levels.blocks if levels else [])
    layers = _layers(members(metrics.get("layers")), alive, dropped)
    return Quantization(
        config=members(stage.get("config")),
        format=text(metrics.get("format"), 100),
        bits=number(metrics.get("bits_per_weight")),
        weights=weights,
        split=_split(metrics, weights),
        layers=layers,
        skipped=_reasons(metrics.get("skipped")),
        fold=_fold(members(metrics.get("fold"))),
        rate_search=_rate_search(members(metrics.get("perplexity_search"))),
        level_search=levels,
        training=_training(members(metrics.get("training")), layers, alive),
        dropped=dropped,
    )


def _split(metrics: Mapping[str, Any], weights: int | None) -> dict[str, float]:
    parts = {"codes": "code_bits", "scales": "scale_bits", "zero points": "zero_point_bits"}
    found = {name: count(metrics.get(member)) for name, member in parts.items()}
    return {name: bits / weights for name, bits in found.items() if bits is not None and weights}


def _layers(table: dict[str, Any], alive: list[int], dropped: Removed) -> list[Layer]:
    """Only the stack of blocks that has most of them counts as blocks."""
    cut = {block for blocks in dropped.values() for block in blocks}
    named = {text(name, 200): members(found) for name, found in [*table.items()][:_MOST_LAYERS]}
    places = {name: _NUMBERED.match(name) for name in named}
    stacks = Counter(match[1] for match in places.values() if match)
    stack = max(stacks, key=stacks.__getitem__, default=None)

    def block(match: re.Match[str] | None) -> int | None:
        inside = match and match[1] == stack and int(match[2]) < len(alive)
        return alive[int(match[2])] if match and inside else None

    def measured(name: str, found: dict[str, Any], member: str) -> float | None:
        absent = "c" not in found and block(places[name]) in cut  # zeros have no step
        return None if absent else number(found.get(member))

    roles = {name: kind(f"{name}.weight") for name in named}
    short = Counter(role.rpartition(".")[2] for role in set(roles.values()))
    return [
        Layer(
            name=name,
            kind=last if short[last := roles[name].rpartition(".")[2]] == 1 else roles[name],
            block=block(places[name]),
            bits=measured(name, found, "bits_per_weight"),
            sqnr=measured(name, found, "sqnr_db"),
        )
        for name, found in named.items()
    ]


def _reasons(value: Any) -> dict[str, list[str]]:
    """Names by reason, the reasons with most of them first."""
    found: dict[str, list[str]] = {}
    for name, reason in [*members(value).items()][:_MOST_LAYERS]:
        found.setdefault(text(reason, 200) or "no reason given", []).append(text(name, 200))
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _fold(found: dict[str, Any]) -> Fold | None:
    if not found:
        return None
    skipped = _reasons(found.get("skipped"))
    return Fold(number(found.get("alpha")), count(found.get("layers")), skipped)


def _rate_search(found: dict[str, Any]) -> RateSearch | None:
    if not found:
        return None
    trials = [
        (rate, number(trial.get("ratio")))
        for trial in entries(found.get("trials"))[:_MOST_TRIALS]
        if (rate := number(trial.get("bits_per_weight"))) is not None
    ]
    trials.sort(key=lambda trial: trial[0])
    return RateSearch(number(found.get("max_ratio")), number(found.get("ratio")), trials)


def _level_search(found: dict[str, Any], alive: list[int]) -> LevelSearch | None:
    if not found:
        return None
    offsets = {part: items(members(found.get("units")).get(part)) for part in PARTS}
    blocks = min(_MOST_BLOCKS, max(map(len, offsets.values())))
    return LevelSearch(
        start=number(found.get("start_loss")),
        found=number(found.get("loss")),
        unseen=numbers(found.get("unseen")),
        history=numbers(found.get("history")),
        blocks=alive[:blocks],
        levels={
            part: [number(value) for value in (values + [None] * blocks)[:blocks]]
            for part, values in offsets.items()
        },
    )


def _dropped(value: Any, blocks: list[int]) -> Removed:
    """The parts that the search left out of ``blocks``, those that it has levels for."""
    pairs = [pair for pair in items(value) if len(items(pair)) == 2]
    found = {
        part: sorted(
            {
                blocks[place]
                for name, index in pairs
                if name == part and (place := count(index)) is not None and place < len(blocks)
            }
        )
        for part in PARTS
    }
    return {part: gone for part, gone in found.items() if gone}


def _training(found: dict[str, Any], layers: list[Layer], alive: list[int]) -> Training | None:
    if not found:
        return None
    windows = _windows(found.get("windows"), alive)
    history = numbers(found.get("history"))
    entropies = [number(value) for value in items(found.get("entropies"))]
    # A window without a layer to train is left out of the training.
    blocks = {layer.block for layer in layers}
    busy = [last for first, last in windows if blocks & {*range(first, last + 1)}]
    steps = len(history) // len(busy) if busy and len(history) % len(busy) == 0 else 0
    errors = [number(value) for value in items(found.get("errors"))]
    behind = zip(busy, errors, strict=True) if len(errors) == len(busy) else ()
    return Training(
        mode=text(found.get("mode"), 100),
        partition=text(found.get("partition"), 100),
        literal=found.get("paper_literal") is True,
        windows=windows,
        borders=[steps * window for window in range(1, len(busy))] if steps else [],
        entropies=[
            (block, value)
            for block, value in zip(alive, entropies, strict=False)
            if value is not None
        ],
        history=history,
        errors=[(block, error) for block, error in behind if error is not None],
        oscillation=number(found.get("oscillation")),
    )


def _windows(value: Any, alive: list[int]) -> list[tuple[int, int]]:
    """First and last blocks; none where they are not blocks in order."""
    found: list[tuple[int, int]] = []
    end = 0
    for bounds in items(value):
        if len(items(bounds)) != 2 or None in (pair := [count(bound) for bound in bounds]):
            return []
        start, stop = (bound or 0 for bound in pair)
        if not end <= start < stop <= len(alive):
            return []
        found.append((alive[start], alive[stop - 1]))
        end = stop
    return found
