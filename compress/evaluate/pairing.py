"""Two evaluations document by document."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import BadInput, did_you_mean
from compress.evaluate.harness import Evaluation
from compress.evaluate.paired import Comparison, compare

_HASHES = {"doc_hash": "documents", "prompt_hash": "prompts", "target_hash": "targets"}


@dataclass(frozen=True)
class TaskComparison:
    """A task's or a group's scores compared; ``metric`` with its filter, as ``acc,none``."""

    task: str
    metric: str
    comparison: Comparison


def compare_tasks(
    reference: Evaluation,
    candidate: Evaluation,
    asked: Sequence[str],
    *,
    metric: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[TaskComparison]:
    """Compare what both models scored on the same documents of each task in ``asked``.

    A group with a score of its own is one comparison over the documents of all its tasks, each of
    the same weight; other groups, and tags, stand for their tasks. ``metric``: as ``acc_norm`` or
    ``exact_match,flexible-extract``; by default the first that a task or group names, after its
    first filter. Raises `BadInput` for names and metrics that are not there, documents, prompts or
    versions of tasks that differ, and scores that are not finite.
    """
    found = []
    for name in asked:
        if name not in reference.asked or name not in candidate.asked:
            raise BadInput(f"task '{name}' was not evaluated on both models")
        for part in reference.asked[name]:
            for task in _judged(reference.results, part):
                found.append(_compare(reference, candidate, task, metric, confidence, seed))
    return found


def same_responses(reference: Evaluation, candidate: Evaluation) -> list[str]:
    """The documents, as ``TASK DOC_ID``, whose raw responses differ in any bit, or that one lacks.

    Floats are compared by their bits: NaN equals itself, and 0.0 is not -0.0.
    """
    before, after = (dict(_responses(evaluation)) for evaluation in (reference, candidate))
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _judged(results: dict[str, Any], name: str) -> list[str]:
    """The tasks and groups with a score that a name stands for."""
    children = results["group_subtasks"].get(name)
    if children is None or name in results.get("groups", {}):
        return [name]
    return [task for child in children for task in _judged(results, child)]


def _leaves(results: dict[str, Any], name: str) -> list[str]:
    children = results["group_subtasks"].get(name)
    return [name] if children is None else [t for c in children for t in _leaves(results, c)]


def _compare(
    reference: Evaluation,
    candidate: Evaluation,
    name: str,
    wanted: str | None,
    confidence: float,
    seed: int,
) -> TaskComparison:
    leaves = _leaves(reference.results, name)
    metric = _metric(reference.results, name, leaves[0], wanted)
    score, _, kind = metric.partition(",")
    pairs = [pair for leaf in leaves for pair in _pairs(reference, candidate, leaf, score, kind)]
    higher = {reference.results["higher_is_better"][leaf].get(score) for leaf in leaves}
    if higher not in ({True}, {False}):
        raise BadInput(f"its tasks do not say whether a higher {score} is better", where=name)
    comparison = compare(
        [before for before, _ in pairs],
        [after for _, after in pairs],
        higher_is_better=True in higher,
        aggregate=_aggregate(reference, leaves, score),
        confidence=confidence,
        seed=seed,
    )
    return TaskComparison(name, metric, comparison)


def _metric(results: dict[str, Any], name: str, leaf: str, wanted: str | None) -> str:
    """The full name of the metric that is wanted, or of the first that lm-eval reports."""
    filters = dict.fromkeys(sample["filter"] for sample in results["samples"][leaf])
    every = [f"{score},{kind}" for kind in filters for score in results["higher_is_better"][leaf]]
    known = [metric for metric in every if metric in results["results"][leaf if wanted else name]]
    for metric in known:
        if wanted in (None, metric, metric.partition(",")[0]):
            return metric
    raise BadInput(
        f"no metric '{wanted}'" if wanted else "no metric to compare by",
        where=name,
        mend=did_you_mean(wanted or "", known),
    )


def _pairs(
    reference: Evaluation, candidate: Evaluation, leaf: str, score: str, kind: str
) -> Iterator[tuple[Any, Any]]:
    """Both models' scores of a task's documents."""
    versions = [evaluation.results["versions"].get(leaf) for evaluation in (reference, candidate)]
    if versions[0] != versions[1]:
        raise BadInput("versions differ", where=leaf, got=versions[1], expected=versions[0])
    before, after = (
        {s["doc_id"]: s for s in e.results["samples"].get(leaf, ()) if s["filter"] == kind}
        for e in (reference, candidate)
    )
    if not any(score in sample for sample in before.values()):
        raise BadInput(f"no metric '{score},{kind}'", where=leaf)
    if before.keys() != after.keys():
        raise BadInput(
            "the models were asked about different documents",
            where=leaf,
            got=f"{len(after)} of the candidate",
            expected=f"the {len(before)} of the reference",
        )
    for document, sample in before.items():
        other = after[document]
        for key, what in _HASHES.items():
            if sample[key] != other[key]:
                raise BadInput(
                    f"the models were given different {what}",
                    where=f"{leaf}, document {document}",
                    mend="do both have the same tokenizer and chat template?",
                )
        if (score in sample) != (score in other):
            raise BadInput(f"only one has the metric {score}", where=f"{leaf}, document {document}")
        if score in sample:
            yield _plain(sample[score]), _plain(other[score])


def _plain(score: Any) -> Any:
    """Without numpy, whose arrays have no truth."""
    if isinstance(score, list | tuple):
        return tuple(map(_plain, score))
    return score.tolist() if hasattr(score, "tolist") else score


def _aggregate(
    evaluation: Evaluation, leaves: list[str], score: str
) -> Callable[[list[Any]], float] | None:
    """How documents' scores become one; None for the mean."""
    from lm_eval.api.metrics import mean

    ways = {evaluation.aggregations[leaf].get(score, mean) for leaf in leaves}
    if len(ways) > 1:
        raise BadInput(f"its tasks have different kinds of {score}", where=", ".join(leaves))
    way = ways.pop()
    return None if way is mean else way


def _responses(evaluation: Evaluation) -> Iterator[tuple[str, Any]]:
    for task, samples in evaluation.results["samples"].items():
        for sample in samples:
            yield f"{task} {sample['doc_id']}", _bits(sample["resps"])


def _bits(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_bits, value))
    return struct.pack("<d", value) if isinstance(value, float) else value
