"""What the pruning stages of a manifest say of themselves, read as that of somebody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.scores import Scores
from compress.report.values import count, counts, entries, items, members, number, numbers, text

KINDS = ("block", "attention", "mlp")
_MOST = 1 << 16  # blocks of a model

Removed = dict[str, list[int]]
"""By kind the blocks that lost it, ascending; only kinds that some block lost."""


@dataclass(frozen=True)
class Candidate:
    """A set that was looked at; ``kl``: what it costs on the search's text, in nats a token."""

    rule: str
    removed: Removed
    kl: float | None


@dataclass(frozen=True)
class Search:
    """``history``: the best KL after each generation; ``one_shot`` and ``found``: the KLs on
    held-out windows of the set that the scorer gives at once and of the one found; ``kept``: which
    of the two was removed, "" where unknown."""

    method: str
    history: list[float]
    one_shot: float | None
    found: float | None
    kept: str


@dataclass(frozen=True)
class Healing:
    """``before`` and ``after``: KLs in nats a token; ``history``: the loss after each step."""

    method: str
    before: float | None
    after: float | None
    kept: bool
    history: list[float]


@dataclass(frozen=True)
class Budget:
    """``measure``: "drops" for a number of units, else of what ``asked`` is a share."""

    measure: str
    asked: float | None
    reached: float | None


@dataclass(frozen=True)
class Pruning:
    """One `prune_blocks` stage; blocks go by their numbers in the original model.

    ``blocks``: those that there were. ``method``: how it searched. ``scores``: one of each kind,
    those of ``scorer`` or, where that is a rule without, of the first scorer measured.
    ``stability``: the share of resamples of the calibration text with the same choice.
    """

    granularity: str
    method: str
    scorer: str
    blocks: list[int]
    removed: Removed
    scores: list[Scores]
    stability: float | None
    candidates: list[Candidate]
    search: Search | None
    budget: Budget | None
    healing: Healing | None


def read_prunings(stages: Sequence[dict[str, Any]]) -> list[Pruning]:
    """The pruning stages; a later one's numbers are led back to those of the original model.

    What does not fit what the stage before left is left out, and so is what follows.
    """
    found: list[Pruning] = []
    alive: list[int] | None = None
    for stage in stages:
        metrics = members(stage.get("metrics"))
        blocks = count(metrics.get("blocks"))
        if stage.get("stage") != "prune_blocks" or not blocks or blocks > _MOST:
            continue
        alive = list(range(blocks)) if alive is None else alive
        if len(alive) != blocks:
            break
        pruning = _pruning(members(stage.get("config")), metrics, alive)
        found.append(pruning)
        gone = set(pruning.removed.get("block", []))
        alive = [block for block in alive if block not in gone]
    return found


def together(prunings: Sequence[Pruning]) -> Removed:
    """What all of them removed."""
    return merge([pruning.removed for pruning in prunings])


def merge(removed: Sequence[Removed]) -> Removed:
    """What is in any of them."""
    lost = {
        kind: sorted({block for each in removed for block in each.get(kind, [])}) for kind in KINDS
    }
    return {kind: blocks for kind, blocks in lost.items() if blocks}


def _pruning(config: dict[str, Any], metrics: dict[str, Any], alive: list[int]) -> Pruning:
    scorer = text(config.get("scorer"), 100)
    removed = _removed(metrics.get("removed"), alive)
    signals = members(metrics.get("signals"))
    scores = [_scores(kind, members(signals.get(kind)), scorer, removed, alive) for kind in KINDS]
    candidates = [
        Candidate(
            text(entry.get("rule"), 100) or "unnamed",
            _removed(entry.get("removed"), alive),
            number(entry.get("kl")),
        )
        for entry in entries(metrics.get("candidates"))
    ]
    return Pruning(
        granularity=text(metrics.get("granularity"), 100),
        method=text(config.get("search"), 100),
        scorer=scorer,
        blocks=alive,
        removed=removed,
        scores=[found for found in scores if found],
        stability=number(members(metrics.get("stability")).get("same_choice")),
        candidates=sorted(candidates, key=lambda each: (each.kl is None, each.kl or 0.0)),
        search=_search(metrics.get("search")),
        budget=_budget(metrics.get("budget")),
        healing=_healing(metrics.get("healing")),
    )


def _removed(value: Any, alive: list[int]) -> Removed:
    lost = {kind: _blocks(members(value).get(kind), alive) for kind in KINDS}
    return {kind: blocks for kind, blocks in lost.items() if blocks}


def _blocks(value: Any, alive: list[int]) -> list[int]:
    return [alive[i] for i in sorted(set(counts(value))) if i < len(alive)]


def _scores(
    kind: str, table: dict[str, Any], scorer: str, removed: Removed, alive: list[int]
) -> Scores | None:
    """None where there are no scores of as many blocks as there were."""
    scored = members(table.get("scores"))
    shown = scorer if scorer in scored else next(iter(scored), "")
    values = items(scored.get(shown))
    if len(values) != len(alive):
        return None
    errors = items(members(table.get("standard_errors")).get(shown)) + [None] * len(values)
    return Scores(
        kind=kind,
        scorer=text(shown, 100),
        blocks=alive,
        values=[number(value) for value in values],
        errors=[number(error) for error in errors[: len(values)]],
        gone=removed.get(kind, []),
        protected=_blocks(table.get("protected"), alive),
        sinks=_blocks(table.get("sink_writers"), alive),
    )


def _search(value: Any) -> Search | None:
    found = members(value)
    kept = text(found.get("kept"))
    if not found:
        return None
    return Search(
        method=text(found.get("method"), 100) or "unnamed",
        history=numbers(found.get("history")),
        one_shot=number(found.get("one_shot_kl")),
        found=number(found.get("found_kl")),
        kept=kept if kept in ("found", "one_shot") else "",
    )


def _healing(value: Any) -> Healing | None:
    found = members(value)
    if not found:
        return None
    return Healing(
        method=text(found.get("method"), 100) or "unnamed",
        before=number(found.get("kl_before")),
        after=number(found.get("kl_after")),
        kept=found.get("kept") is True,
        history=numbers(found.get("history")),
    )


def _budget(value: Any) -> Budget | None:
    found = members(value)
    measure = text(found.get("measure"), 100)
    if not measure:
        return None
    return Budget(measure, number(found.get("asked")), number(found.get("reached")))
