from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from compress import checkpoint as room
from compress.errors import BadInput
from compress.evaluate import EvalOptions, Evaluation, compare_tasks, run_tasks, same_responses

NAMES = ("tiny_group", "tiny_tag", "tiny_generate")


@pytest.fixture(scope="module")
def evaluations(
    tiny_llama: Path, tiny_llama_tied: Path, tasks: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, Evaluation]:
    """Two different models on all tiny tasks. Read-only."""
    directory = tmp_path_factory.mktemp("pairing")
    options = EvalOptions(NAMES, tasks, limit=25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROPRESS_CACHE", str(directory))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        return tuple(
            run_tasks(room.open(path), options, directory / path.name)
            for path in (tiny_llama, tiny_llama_tied)
        )


@pytest.fixture
def changed(evaluations: tuple[Evaluation, Evaluation]) -> Evaluation:
    """A candidate of one's own, so far the reference's equal."""
    reference = evaluations[0]
    results = copy.deepcopy(reference.results)
    return Evaluation("changed", results, reference.asked, reference.aggregations)


def test_a_row_for_all_that_has_a_score(evaluations: tuple[Evaluation, Evaluation]) -> None:
    reference, candidate = evaluations
    found = compare_tasks(reference, candidate, NAMES)
    assert [(row.task, row.metric, row.comparison.documents) for row in found] == [
        ("tiny_group", "acc,none", 45),
        ("tiny_likelihood", "perplexity,none", 25),
        ("tiny_rolling", "word_perplexity,none", 20),
        ("tiny_generate", "exact_match,first", 6),
    ]
    assert [row.comparison.method for row in found] == ["tango", *["bootstrap"] * 2, "tango"]
    for row in found:
        for evaluation, score in (
            (reference, row.comparison.reference),
            (candidate, row.comparison.candidate),
        ):
            assert score == pytest.approx(evaluation.results["results"][row.task][row.metric])
    group, likelihood = found[0].comparison, found[1].comparison
    assert group.drop.estimate == pytest.approx(group.reference - group.candidate)
    assert likelihood.drop.estimate == pytest.approx(likelihood.candidate - likelihood.reference)


def test_a_bundle_stands_for_its_parts(
    tiny_llama: Path, tasks: str, tmp_path: Path, own_cache: Path, hasty: None
) -> None:
    options = EvalOptions(("tiny_bundle",), tasks, limit=12)
    found = run_tasks(room.open(tiny_llama), options, tmp_path / "journal")
    rows = compare_tasks(found, found, options.tasks)
    assert [(row.task, row.comparison.documents) for row in rows] == [
        ("tiny_group", 24),
        ("tiny_rolling", 12),
    ]
    assert all(row.comparison.drop.estimate == 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "metric", "found"),
    [
        ("tiny_group", "acc_norm", "acc_norm,none"),
        ("tiny_generate", "exact_match", "exact_match,first"),
        ("tiny_generate", "exact_match,clean", "exact_match,clean"),
    ],
)
def test_other_metrics(
    name: str, metric: str, found: str, evaluations: tuple[Evaluation, Evaluation]
) -> None:
    (row,) = compare_tasks(*evaluations, [name], metric=metric)
    assert row.metric == found


def test_confidence_and_pairing_by_document(
    evaluations: tuple[Evaluation, Evaluation], changed: Evaluation
) -> None:
    samples = changed.results["samples"]["tiny_choice"]
    samples.reverse()
    samples[3]["acc"] = 1.0 - samples[3]["acc"]
    (row,) = compare_tasks(evaluations[0], changed, ["tiny_group"], confidence=0.8)
    assert row.comparison.lost + row.comparison.won == 1
    assert row.comparison.drop.confidence == 0.8


def drop_document(evaluation: Evaluation) -> None:
    evaluation.results["samples"]["tiny_choice"].pop()


def other_prompt(evaluation: Evaluation) -> None:
    evaluation.results["samples"]["tiny_choice"][2]["prompt_hash"] = "0"


def other_document(evaluation: Evaluation) -> None:
    evaluation.results["samples"]["tiny_choice"][2]["doc_hash"] = "0"


def other_target(evaluation: Evaluation) -> None:
    evaluation.results["samples"]["tiny_other"][2]["target_hash"] = "0"


def other_version(evaluation: Evaluation) -> None:
    evaluation.results["versions"]["tiny_other"] = 2.0


def no_number(evaluation: Evaluation) -> None:
    evaluation.results["samples"]["tiny_choice"][2]["acc"] = math.nan


def no_metric(evaluation: Evaluation) -> None:
    del evaluation.results["samples"]["tiny_choice"][2]["acc"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_document, "tiny_choice: .* different documents, got 24 .*, expected the 25"),
        (other_prompt, "tiny_choice, document 2: the models were given different prompts"),
        (other_document, "tiny_choice, document 2: the models were given different documents"),
        (other_target, "tiny_other, document 2: the models were given different targets"),
        (other_version, "tiny_other: versions differ, got 2.0, expected 1.0"),
        (no_number, "not finite"),
        (no_metric, "tiny_choice, document 2: only one has the metric acc"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    change: Any, message: str, evaluations: tuple[Evaluation, Evaluation], changed: Evaluation
) -> None:
    change(changed)
    with pytest.raises(BadInput, match=message):
        compare_tasks(evaluations[0], changed, ["tiny_group"])


def test_names_that_are_not_there(evaluations: tuple[Evaluation, Evaluation]) -> None:
    with pytest.raises(BadInput, match="no metric 'acc_nrom'; did you mean 'acc_norm,none'"):
        compare_tasks(*evaluations, ["tiny_group"], metric="acc_nrom")
    with pytest.raises(BadInput, match="tiny_generate: no metric 'acc'"):
        compare_tasks(*evaluations, ["tiny_generate"], metric="acc")
    with pytest.raises(BadInput, match="task 'tiny_choice' was not evaluated on both"):
        compare_tasks(*evaluations, ["tiny_choice"])


def test_a_metric_without_a_direction_is_refused(
    evaluations: tuple[Evaluation, Evaluation], changed: Evaluation
) -> None:
    changed.results["higher_is_better"]["tiny_other"]["acc"] = None
    with pytest.raises(BadInput, match="do not say whether a higher acc is better"):
        compare_tasks(changed, evaluations[1], ["tiny_group"])


def test_responses_are_compared_by_their_bits(
    evaluations: tuple[Evaluation, Evaluation], changed: Evaluation
) -> None:
    reference = evaluations[0]
    assert same_responses(reference, changed) == []
    samples = changed.results["samples"]
    value, greedy = samples["tiny_choice"][3]["resps"][0][0]
    samples["tiny_choice"][3]["resps"][0][0] = (math.nextafter(value, 0), greedy)
    assert same_responses(reference, changed) == ["tiny_choice 3"]
    value, greedy = samples["tiny_choice"][4]["resps"][1][0]
    samples["tiny_choice"][4]["resps"][1][0] = (value, not greedy)
    samples["tiny_rolling"].pop()
    assert same_responses(changed, reference) == [
        *("tiny_choice 3", "tiny_choice 4", "tiny_rolling 19")
    ]
    for sample, bits in ((reference, 0.0), (changed, -0.0)):
        pair = copy.deepcopy(sample.results["samples"]["tiny_other"][:1])
        pair[0]["resps"] = [[(bits, True)]]
        samples[f"zero {bits}"] = pair
    zeros = [Evaluation("z", {"samples": {"t": samples[f"zero {z}"]}}) for z in (0.0, -0.0)]
    assert same_responses(*zeros) == ["t 0"]
    nan = copy.deepcopy(zeros[0])
    nan.results["samples"]["t"][0]["resps"] = [[(math.nan, True)]]
    assert same_responses(nan, nan) == []
