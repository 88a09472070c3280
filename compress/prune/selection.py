"""Which units go: a rule's choice, or that of a search, whichever text that neither saw prefers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput, did_you_mean
from compress.progress import SILENT, Progress
from compress.prune.angular_window import window_angular
from compress.prune.budget import Budget
from compress.prune.evolution import Evolution, evolve
from compress.prune.fitness import BLOCK, Removal, RemovalLoss, Unit
from compress.prune.remembered import Remembered
from compress.prune.search import (
    best_window,
    greedy,
    iterative,
    last_first,
    random_order,
    windows_of,
)
from compress.prune.units import Units, without
from compress.signals import SCORERS, SCORERS_DEFAULT, BlockTable, collect

if TYPE_CHECKING:
    import torch

RULES = (
    *SCORERS,
    "leave_one_out_kl",
    "leave_one_out_perplexity",
    "window_angular",
    "last_k",
    "random",
)
SEARCHES = ("one_shot", "best_scorer", "iterative", "greedy", "evolutionary")
_OF_EVERY_SCORER = ("best_scorer", "evolutionary")
# EntroDrop's own are those that do not heed sinks: nothing to propose where ours are.
PROPOSING = tuple(name for name in SCORERS if not name.startswith("entrodrop_"))


@dataclass(frozen=True)
class Candidate:
    """What a rule would remove; ``kl``: of that, on the text of the search, where it was asked."""

    rule: str
    removed: Removal
    kl: float | None = None


@dataclass(frozen=True)
class Searched:
    """How a search went: each generation's best KL, and the two KLs on text it did not see."""

    method: str
    history: tuple[float, ...]
    one_shot_kl: float
    found_kl: float

    @property
    def kept(self) -> str:
        """ "found" where the search won, else "one_shot"."""
        return "found" if self.found_kl < self.one_shot_kl else "one_shot"


@dataclass(frozen=True)
class Selection:
    """What to remove and why; ``tables``: by kind of unit the scores of one pass."""

    removed: Removal
    tables: Mapping[str, BlockTable]
    candidates: Sequence[Candidate]
    search: Searched | None


def select(
    model: Any,
    units: Units,
    budget: Budget,
    tokens: torch.Tensor,
    heldout: torch.Tensor | None = None,
    *,
    scorer: str,
    search: str = "one_shot",
    evolution: Evolution | None = None,
    seed: int = 0,
    tables: Mapping[str, BlockTable] | None = None,
    journal: Path | None = None,
    subject: str = "",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Selection:
    """Choose units of a float32 ``model`` in eval mode until the ``budget`` is met.

    ``scorer``, one of `RULES`, makes the one-shot choice; ``search``, one of `SEARCHES`, looks for
    a better one by the KL divergence from the whole model on ``tokens``: the best of all scorers'
    choices, one step at a time with scores taken anew ("iterative"), one step at a time by that
    divergence ("greedy"), or by evolution from all scorers' choices. The one-shot choice (in an
    evolution the best of all of them) stays unless the other is better on ``heldout``.

    ``tokens`` and ``heldout``: int64 [sequences, length]. ``tables``: those of an earlier selection
    on the same tokens that took all scorers that this one needs. ``journal``: a directory for what
    was measured of the model that ``subject`` names, from which an interrupted search goes on to
    the same result. Raises `BadInput` for an unknown rule or search or one that does not fit the
    units, and what `collect`, `RemovalLoss`, `Remembered` and `evolve` raise.
    """
    check_rules(scorer, search, units.kinds)
    wanted = PROPOSING if search in _OF_EVERY_SCORER else (*SCORERS_DEFAULT, scorer)
    measured = [name for name in SCORERS if name in (*wanted, scorer)]
    measure = partial(
        _tables, model, units, tokens, scorers=measured, threads=threads, progress=progress
    )

    def loss(metric: str) -> Remembered:
        fitness = RemovalLoss(model, tokens, parts=units.parts, metric=metric, progress=progress)
        text = hashlib.sha256(tokens.cpu().contiguous().numpy()).hexdigest()
        told = f"{subject} {list(tokens.shape)} {text}"
        return Remembered(fitness, journal and journal / f"{metric}.json", told)

    kl = loss("kl")
    tables = measure() if tables is None else tables
    sets = {name: budget.cut(_order(_scores(tables, name), budget)) for name in measured}
    if scorer.startswith("leave_one_out_"):
        alone = [frozenset({unit}) for unit in budget.units]
        losses = (kl if scorer.endswith("_kl") else loss("perplexity"))(alone)
        sets[scorer] = budget.cut(_order(dict(zip(budget.units, losses, strict=True)), budget))
    elif scorer == "window_angular":
        sets[scorer] = _window(model, tokens, budget, progress)
    elif scorer in ("last_k", "random"):
        last = scorer == "last_k"
        sets[scorer] = budget.cut(
            last_first(budget.units) if last else random_order(budget.units, seed)
        )
    one_shot, found, history = sets[scorer], sets[scorer], tuple[float, ...]()
    known: dict[Removal, float] = {}
    if search == "best_scorer":
        known = dict(zip(sets.values(), kl(list(sets.values())), strict=True))
        found = min(known, key=lambda removal: known[removal])
    elif search == "iterative":

        def rescore(gone: Removal) -> Mapping[Unit, Any]:
            with without(model, gone, units.parts):
                return _scores(measure(scorers=[scorer]), scorer)

        found = budget.cut(iterative(rescore, budget, progress))
    elif search == "greedy":
        found = budget.cut(greedy(kl, budget, progress))
    elif search == "evolutionary":
        settings = evolution or Evolution(seed=seed)
        starts = list(dict.fromkeys(sets.values()))
        evolved = evolve(kl, budget, starts, settings, progress=progress)
        known = dict(zip(starts, kl(starts, settings.tokens[-1]), strict=True))
        one_shot = min(known, key=lambda removal: known[removal])
        found, history = evolved.removed, evolved.history
    candidates = [Candidate(rule, removed, known.get(removed)) for rule, removed in sets.items()]
    if search == "one_shot" or heldout is None:
        return Selection(found, tables, candidates, None)
    arbiter = RemovalLoss(model, heldout, parts=units.parts, progress=progress)
    searched = Searched(search, history, *arbiter([one_shot, found]))
    removed = found if searched.kept == "found" else one_shot
    return Selection(removed, tables, candidates, searched)


def check_rules(scorer: str, search: str, kinds: Sequence[str]) -> None:
    """Raise `BadInput` for a rule or a search that is not known or not one for these units."""
    for name, known in ((scorer, RULES), (search, SEARCHES)):
        if name not in known:
            raise BadInput(f"no such rule '{name}'", mend=did_you_mean(name, known))
    if scorer == "window_angular" and tuple(kinds) != (BLOCK,):
        raise BadInput(
            "windows are of whole blocks",
            where="prune_blocks.scorer",
            got=", ".join(kinds),
            mend="granularity: block",
        )
    if search == "iterative" and scorer not in SCORERS:
        raise BadInput(
            f"'{scorer}' has no scores to take anew after each removal",
            where="prune_blocks.search",
            expected=f"one of {', '.join(SCORERS)}",
            mend="search: greedy" if scorer.startswith("leave_one_out_") else None,
        )


def _tables(
    model: Any,
    units: Units,
    tokens: torch.Tensor,
    *,
    scorers: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> dict[str, BlockTable]:
    return {
        kind: collect(
            model,
            tokens,
            parts=units.to_score(model, kind),
            scorers=scorers,
            threads=threads,
            progress=progress,
        )
        for kind in units.kinds
    }


def _scores(tables: Mapping[str, BlockTable], scorer: str) -> dict[Unit, Any]:
    """By unit what decides its place, the lowest to go first."""
    return {
        (kind, block): place
        for kind, table in tables.items()
        for block, place in enumerate(table.places(scorer))
    }


def _order(scores: Mapping[Unit, Any], budget: Budget) -> list[Unit]:
    return sorted(budget.costs, key=lambda unit: (scores[unit], unit))


def _window(model: Any, tokens: torch.Tensor, budget: Budget, progress: Progress) -> Removal:
    """The smallest window of adjacent blocks that is enough, where the stream turns least."""
    blocks = sorted(index for _, index in budget.costs)
    for size in range(1, len(blocks) + 1):
        if any(budget.met(window) for window in windows_of(size, budget)):
            distances = window_angular(model, tokens, size, progress=progress)
            return best_window(distances, size, budget)
    raise BadInput(
        "no adjacent blocks may all go and are enough", mend="remove less, or protect fewer blocks"
    )
