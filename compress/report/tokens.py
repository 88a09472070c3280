"""What the pruning of tokens says of itself in a manifest, read as that of somebody else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.overlay import Overlay, read_overlay
from compress.report.pruning import read_prunings, together
from compress.report.values import count, entries, items, members, number, text

RANDOM = "random"
_MOST_SELECTORS = 32
_MOST_LAYERS = 1024
_MOST_OVERLAYS = 3


@dataclass(frozen=True)
class Less:
    """How much less than random tokens the chosen ones lose, in nats a token, and its interval."""

    estimate: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TokenPruning:
    """A `prune_tokens` stage; None is what is unknown.

    ``keep``: the share of the tokens that stays, or (an int) their number. ``layer``: before which
    they go, counted from 0; ``named``: whether the recipe names it, or else leaves it to the
    entropy; ``collapse``: before which the entropy collapses, None where it does not; ``gone``:
    blocks removed before, which no number counts. ``entropies``: of what enters each layer, from 0
    to 1. ``losses``: in nats a token by selector, the least first. ``tokens``: those of an input
    that may go, on average. ``flops``: what is left of a prompt's, a share.
    """

    target: str
    keep: float | None
    layer: int | None
    named: bool
    selector: str
    insisted: bool
    sinks: int | None
    recent: int | None
    collapse: int | None
    gone: int
    entropies: list[float | None]
    losses: dict[str, float | None]
    less: Less | None
    inputs: int | None
    tokens: float | None
    flops: float | None
    overlays: list[Overlay]


def read_token_pruning(stages: Sequence[dict[str, Any]]) -> TokenPruning | None:
    """The last such stage, whose policy stands in the place of earlier ones; None without any."""
    places = [place for place, stage in enumerate(stages) if stage.get("stage") == "prune_tokens"]
    if not places:
        return None
    stage = stages[places[-1]]
    config, metrics = members(stage.get("config")), members(stage.get("metrics"))
    policy = members(metrics.get("policy"))
    target = text(policy.get("target"), 100)
    return TokenPruning(
        target=target if target in ("visual", "text") else "",
        keep=number(policy.get("keep")),
        layer=count(policy.get("layer")),
        named=count(config.get("layer")) is not None,
        selector=text(policy.get("selector"), 100),
        insisted=config.get("insist") is True,
        sinks=count(policy.get("sinks")),
        recent=count(policy.get("recent")),
        collapse=count(metrics.get("collapse_layer")),
        gone=len(together(read_prunings(stages[: places[-1]])).get("block", [])),
        entropies=[number(value) for value in items(metrics.get("entropies"))[:_MOST_LAYERS]],
        losses=_losses(members(metrics.get("losses"))),
        less=_less(members(metrics.get("less_than_random"))),
        inputs=count(metrics.get("inputs")),
        tokens=number(metrics.get("tokens")),
        flops=number(metrics.get("flops_share")),
        overlays=[
            overlay
            for entry in entries(metrics.get("pictures"))[:_MOST_OVERLAYS]
            if (overlay := read_overlay(entry))
        ],
    )


def _losses(table: dict[str, Any]) -> dict[str, float | None]:
    found = {text(name, 100): number(loss) for name, loss in [*table.items()][:_MOST_SELECTORS]}
    return dict(sorted(found.items(), key=lambda each: (each[1] is None, each[1] or 0.0)))


def _less(found: dict[str, Any]) -> Less | None:
    estimate = number(found.get("estimate"))
    if estimate is None:
        return None
    return Less(estimate, number(found.get("low")), number(found.get("high")))
