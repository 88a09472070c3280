"""The tasks that ship with the package: sound documents, sound scoring, no network."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress.evaluate
from compress.errors import BadInput

SUITE = Path(compress.evaluate.__file__).parent / "suite"
COUNTS = {
    "entropress_facts": 50,
    "entropress_cloze": 50,
    "entropress_prose": 20,
    "entropress_copy": 40,
}
METRICS = {
    "entropress_facts": {"acc", "acc_norm"},
    "entropress_cloze": {"acc", "perplexity"},
    "entropress_prose": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
    "entropress_copy": {"exact_match"},
}


def documents(task: str) -> list[dict[str, Any]]:
    path = SUITE / f"{task.removeprefix('entropress_')}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def evaluate(model: Any, suite: Path = SUITE, **options: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(suite), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=["entropress_suite"], task_manager=manager, bootstrap_iters=0, **options
    )


def scores(results: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {
        (task, metric.removesuffix(",none")): value
        for task, values in results["results"].items()
        for metric, value in values.items()
        if metric.endswith(",none") and "stderr" not in metric
    }


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    """A model that is sure of the right texts and only of them, asked everything."""
    from lm_eval.api.model import LM

    right = {
        f"Question: {d['question']}\nAnswer: {d['choices'][d['answer']]}"
        for d in documents("entropress_facts")
    } | {f"{d['context']} {d['word']}" for d in documents("entropress_cloze")}
    answers = {d["prompt"]: d["answer"] for d in documents("entropress_copy")}

    class Oracle(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            known = ("".join(request.args) in right for request in requests)
            return [(0.0, True) if yes else (-9.0, False) for yes in known]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [-math.log(2) * len(request.args[0].encode()) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            for request in requests:
                assert request.args[1]["until"] == ["\n"]
                assert request.args[1]["max_gen_toks"] == 16
                assert not request.args[1]["do_sample"]
            return [f" {answers[request.args[0]]}" for request in requests]

    return evaluate(Oracle(), log_samples=True)


def test_who_knows_everything_gets_everything(oracle: dict[str, Any]) -> None:
    found = scores(oracle)
    for task in ("entropress_facts", "entropress_cloze", "entropress_copy"):
        for metric in METRICS[task]:
            assert found[task, metric] == 1.0, (task, metric)
    assert found["entropress_prose", "bits_per_byte"] == pytest.approx(1.0)
    assert found["entropress_prose", "byte_perplexity"] == pytest.approx(2.0)


def test_the_tag_names_four_tasks_with_versions_metrics_and_counts(oracle: dict[str, Any]) -> None:
    assert {task: len(samples) for task, samples in oracle["samples"].items()} == COUNTS
    assert oracle["versions"] == dict.fromkeys(COUNTS, 1.0)
    expected = {(task, metric) for task, metrics in METRICS.items() for metric in metrics}
    assert set(scores(oracle)) == expected


@pytest.mark.parametrize("task", COUNTS)
def test_more_examples_cannot_be_asked_for(task: str) -> None:
    """No document is to spare: a shot would be one that is also scored. Zero in the file binds."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(SUITE), include_defaults=False)
    assert manager.load(task)["tasks"][task].config.num_fewshot == 0


def test_every_task_runs_on_a_real_model_from_any_directory(
    make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    path = make_llama(tmp_path / "model", max_position_embeddings=1024)
    monkeypatch.chdir(tmp_path)
    model = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=8)
    found = scores(evaluate(model, limit=3))
    assert {task for task, _ in found} == set(COUNTS)
    assert all(math.isfinite(value) for value in found.values())
    # A byte takes one of 320 tokens, nearly at random.
    assert found["entropress_prose", "bits_per_byte"] == pytest.approx(math.log2(320), rel=0.1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    suite = Path(shutil.copytree(SUITE, tmp_path / "suite"))
    (suite / "cloze.jsonl").unlink()
    with pytest.raises(BadInput, match=re.escape(str(suite / "cloze.jsonl"))):
        evaluate("dummy", suite)


@pytest.mark.parametrize("task", COUNTS)
def test_no_document_comes_twice(task: str) -> None:
    key = {"facts": "question", "cloze": "context", "prose": "text", "copy": "prompt"}
    texts = [d[key[task.removeprefix("entropress_")]] for d in documents(task)]
    assert len({" ".join(words(text)) or text for text in texts}) == len(texts) == COUNTS[task]
    assert all(text == text.strip() for text in texts)


def test_facts_give_nothing_away() -> None:
    facts = documents("entropress_facts")
    positions = Counter(d["answer"] for d in facts)
    assert set(positions) == {0, 1, 2, 3}
    assert all(8 <= count <= 17 for count in positions.values())
    longest = shortest = 0
    for d in facts:
        lengths = [len(choice) for choice in d["choices"]]
        own = lengths.pop(d["answer"])
        assert len(set(d["choices"])) == 4
        assert max(*lengths, own) <= 2.5 * min(*lengths, own), d["question"]
        longest += own > max(lengths)
        shortest += own < min(lengths)
        others = " ".join(choice for i, choice in enumerate(d["choices"]) if i != d["answer"])
        telling = set(words(d["choices"][d["answer"]])) - set(words(others)) - {"a", "an", "it"}
        assert not telling & set(words(d["question"])), d["question"]
    # Who always picked the longest or the shortest option would do little better than by chance.
    assert longest <= 20
    assert shortest <= 20


def test_the_last_word_of_a_cloze_is_one_plain_word_that_did_not_occur_before() -> None:
    cloze = documents("entropress_cloze")
    for d in cloze:
        assert re.fullmatch(r"[A-Za-z]+", d["word"])
        assert d["word"].lower() not in words(d["context"])
        assert 2 <= len(re.findall(r"[.!?:] ", f"{d['context']} {d['word']}. ")) <= 4
        assert 15 <= len(d["context"].split()) <= 50
    assert len({d["word"] for d in cloze}) == len(cloze)


def test_prose_is_of_twenty_registers_and_of_like_length() -> None:
    prose = documents("entropress_prose")
    assert len({d["register"] for d in prose}) == len(prose)
    assert all(100 <= len(d["text"].split()) <= 180 for d in prose)
    # No sentence stands in two paragraphs.
    sentences = [s for d in prose for s in re.split(r"[.!?]\s", d["text"])]
    assert len(set(sentences)) == len(sentences)


def test_copy_shows_three_examples_and_asks_for_something_else() -> None:
    for d in documents("entropress_copy"):
        *shots, asked = d["prompt"].split("\n")
        assert len(shots) == 3
        assert all(re.fullmatch(r".+ -> .+", shot) for shot in shots)
        assert re.fullmatch(r".+ ->", asked)
        assert not any(shot.startswith(asked) for shot in shots)
        assert d["answer"] == d["answer"].strip()
        # 16 tokens suffice even where each byte is one, with the space before.
        assert 1 <= len(d["answer"]) <= 15
