"""Sentences about pruning that page and card share."""

from __future__ import annotations

from collections.abc import Iterator

from compress.report.pruning import Budget, Candidate, Healing, Pruning, Removed, Search
from compress.report.wording import PARTS, figure

_MEASURES = {"flops": "floating-point operations", "coded_bytes": "coded bytes"}


def units(removed: Removed) -> str:
    """``attention of blocks 3, 7; MLP of block 12``."""
    named = []
    for kind, blocks in removed.items():
        numbers = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
        named.append(f"{PARTS[kind]} of {numbers}" if kind in PARTS else numbers)
    return "; ".join(named) or "nothing"


def tile(pruning: Pruning) -> tuple[str, str, str]:
    """What was removed, how much of it, and by whom it was chosen."""
    parts = [f"{len(blocks)} {PARTS.get(kind, kind)}" for kind, blocks in pruning.removed.items()]
    title, share = "Removed", ", ".join(parts)
    if {*pruning.removed} <= {"block"}:
        title, share = "Blocks removed", str(len(pruning.removed.get("block", [])))
    return title, f"{share} of {len(pruning.blocks)}", f"chosen by {chooser(pruning)}"


def chooser(pruning: Pruning) -> str:
    """The rule that chose what was removed."""
    if pruning.method in ("", "one_shot"):
        return pruning.scorer or "an unknown rule"
    same = [each.rule for each in pruning.candidates if each.removed == pruning.removed]
    rule = pruning.scorer if pruning.scorer in same or not same else same[0]
    if pruning.search and pruning.search.kept == "one_shot":
        return rule or "an unknown rule"
    if pruning.method == "best_scorer":
        return f"{rule}, the best of {len(pruning.candidates)} rules"
    return f"{pruning.method} search"


def sentences(pruning: Pruning) -> list[str]:
    """What was done and how well it went, the unwelcome included."""
    return list(_sentences(pruning))


def _sentences(pruning: Pruning) -> Iterator[str]:
    blocks = len(pruning.blocks)
    yield f"Removed: {units(pruning.removed)}, of {blocks} blocks, chosen by {chooser(pruning)}."
    if kept := sorted({block for scores in pruning.scores for block in scores.protected}):
        yield f"Protected: blocks {', '.join(map(str, kept))}."
    if pruning.budget:
        yield _budget(pruning.budget)
    if pruning.stability is not None:
        yield (
            f"With the calibration text drawn anew, {_percent(pruning.stability)} of the draws "
            "would have it remove the same."
        )
    yield from _who_loses(pruning)
    if pruning.search:
        yield from _search(pruning.search)
    if pruning.healing:
        yield _healing(pruning.healing)


def _budget(budget: Budget) -> str:
    asked, reached = budget.asked, budget.reached
    if budget.measure == "drops":
        return f"Budget: {figure(asked)} asked, {figure(reached)} reached."
    what = _MEASURES.get(budget.measure, budget.measure)
    return f"Budget: {_percent(asked)} of the {what} asked, {_percent(reached)} reached."


def _who_loses(pruning: Pruning) -> Iterator[str]:
    """Says so where the entropy scorer, or else the one that chose, is not the best candidate."""
    measured = [(each.kl, each) for each in pruning.candidates if each.kl is not None]
    if not measured:
        if any(each.removed != pruning.removed for each in pruning.candidates):
            yield (
                "Which candidate harms least was not measured, so nothing here says that "
                f"{pruning.scorer or 'the scorer'} is better than the others."
            )
        return
    entropies = [pair for pair in measured if _is_entropy(pair[1])]
    entropies.sort(key=lambda pair: pair[1].rule != pruning.scorer)
    own = [pair for pair in measured if pair[1].rule == pruning.scorer]
    least, best = measured[0]
    for kl, loser in [*entropies[:1], *own]:
        if kl > least:
            kind = "entropy scorer" if _is_entropy(loser) else "scorer"
            yield (
                f"The {kind} {loser.rule} loses here: what it would remove costs {figure(kl)} nats "
                f"a token on the search text, what {best.rule} would remove {figure(least)}."
            )
            return


def _is_entropy(candidate: Candidate) -> bool:
    return "entro" in candidate.rule or candidate.rule == "effective_rank"


def _search(search: Search) -> Iterator[str]:
    if search.history:
        steps = f"{len(search.history) - 1} {steps_of(search)}s"
        yield (
            f"Search: {search.method}, {steps}; the best KL on its text went from "
            f"{figure(search.history[0])} to {figure(search.history[-1])} nats a token."
        )
    if search.one_shot is not None and search.found is not None:
        kept = {"found": "the found set was removed", "one_shot": "the one-shot set was removed"}
        yield (
            f"On held-out windows of the calibration text the one-shot set costs "
            f"{figure(search.one_shot)} nats a token, the one found {figure(search.found)}; "
            f"{kept.get(search.kept, 'which was removed is not known')}."
        )


def steps_of(search: Search) -> str:
    """What the history of a search counts."""
    return "generation" if search.method == "evolutionary" else "step"


def _healing(healing: Healing) -> str:
    steps = f", {len(healing.history)} steps" if healing.history else ""
    change = f"KL {figure(healing.before)} → {figure(healing.after)} nats a token"
    kept = "kept" if healing.kept else "not kept, the weights are as pruned"
    return f"Healing ({healing.method}{steps}): {change} on text that it was not fitted to; {kept}."


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{figure(100.0 * share)} %"
