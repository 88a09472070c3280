"""The journal with a language model that only counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from compress.errors import BadInput
from compress.evaluate.journal import RANGE, JournaledLM


class Counter:
    """Answers with random numbers; remembers what it was asked, and may be interrupted."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[list[Any]] = []
        self.truncated = 0
        self.dies_at = dies_at
        self.made = 0

    def __call__(self) -> Counter:
        self.made += 1
        return self

    def answer(self, requests: list[Any], make: Any) -> list[Any]:
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append([request.args for request in requests])
        self.truncated += 1
        return [make(value) for value in torch.rand(len(requests)).double().tolist()]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        assert disable_tqdm
        return self.answer(requests, lambda value: (-value / 3, value > 0.5))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        return self.answer(requests, lambda value: -value / 7)

    def generate_until(self, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        return self.answer(requests, lambda value: f"größer als {value}\n")


def requests(documents: int, task: str = "t", choices: int = 3, kind: str = "loglikelihood") -> Any:
    return [
        Instance(kind, {}, (f"question {document}", f"answer {i}"), i, (task, document, 1))
        for document in range(documents)
        for i in range(choices)
    ]


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "journal"


def ask(
    journal: Path, made: Counter, asked: Any, kind: str = "loglikelihood", **options: Any
) -> Any:
    lm = JournaledLM(made, journal, options.pop("settings", {"model": "m"}), **options)
    return getattr(lm, kind)(asked)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_what_was_answered_is_not_asked_again(kind: str, journal: Path) -> None:
    first, second = Counter(), Counter()
    asked = requests(2 * RANGE + 5)
    answers = ask(journal, first, asked, kind)
    assert [len(part) for part in first.asked] == [3 * RANGE, 3 * RANGE, 15]
    assert [args for part in first.asked for args in part] == [request.args for request in asked]
    again = ask(journal, second, asked, kind)
    assert second.made == 0
    assert again == answers
    assert repr(again) == repr(answers)  # types too: lm-eval wants tuples
    assert len(set(answers)) == len(answers)


def test_an_interrupted_run_continues_to_the_same_bits(journal: Path, tmp_path: Path) -> None:
    asked = requests(3 * RANGE, "a") + requests(70, "b", choices=1)
    whole = ask(tmp_path / "whole", Counter(), asked)
    with pytest.raises(KeyboardInterrupt):
        ask(journal, Counter(dies_at=2), asked)
    assert len(list(journal.iterdir())) == 2
    rest = Counter()
    assert ask(journal, rest, asked) == whole
    assert len(rest.asked) == 3


def test_more_documents_use_the_whole_ranges(journal: Path) -> None:
    few = ask(journal, Counter(), requests(RANGE + 10))
    more = Counter()
    many = ask(journal, more, requests(RANGE + 20))
    assert [len(part) for part in more.asked] == [60]
    assert many[: 3 * RANGE] == few[: 3 * RANGE]


def test_settings_and_kinds_have_answers_of_their_own(journal: Path) -> None:
    """In files of their own; what is drawn depends on the questions alone."""
    one = ask(journal, Counter(), requests(3))
    two = ask(journal, Counter(), requests(3), settings={"model": "m", "threads": 2})
    three = ask(journal, Counter(), requests(3, task="u"))
    assert one == two
    assert len({*one, *three}) == 18
    ask(journal, Counter(), requests(3), "generate_until")
    assert len(list(journal.iterdir())) == 4


def test_repeats_get_answers_each(journal: Path) -> None:
    asked = [request for request in requests(4, choices=1) for _ in range(2)]
    answers = ask(journal, Counter(), asked, "generate_until")
    assert len(set(answers)) == 8
    assert ask(journal, Counter(), asked, "generate_until") == answers


def flip(entry: dict[str, Any]) -> None:
    entry["answers"][0][0] /= 2


def lose(entry: dict[str, Any]) -> None:
    entry["answers"].pop()


def rename(entry: dict[str, Any]) -> None:
    entry["requests"] = "0" * 64


def spoil(entry: dict[str, Any]) -> None:
    entry["answers"][0] = "text"


def forget(entry: dict[str, Any]) -> None:
    del entry["truncated"]


@pytest.mark.parametrize("damage", [flip, lose, rename, spoil, forget, None])
def test_a_damaged_file_is_written_anew(damage: Any, journal: Path) -> None:
    asked = requests(5)
    answers = ask(journal, Counter(), asked)
    (file,) = journal.iterdir()
    sound = file.read_bytes()
    entry = json.loads(sound)
    if damage:
        damage(entry)
        file.write_text(json.dumps(entry))
    else:
        file.write_bytes(sound[: len(sound) // 2])
    again = Counter()
    assert ask(journal, again, asked) == answers
    assert len(again.asked) == 1
    assert file.read_bytes() == sound


@pytest.mark.parametrize("value", [float("nan"), None, "text"])
def test_what_is_no_number_is_refused(value: Any, journal: Path) -> None:
    broken = Counter()
    broken.answer = lambda requests, _: [(value, True)] * len(requests)  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="t: the model's log-likelihoods are not numbers"):
        ask(journal, broken, requests(1))
    assert not journal.exists()


def test_minus_infinity_is_a_number(journal: Path) -> None:
    certain = Counter()
    certain.answer = lambda requests, _: [(float("-inf"), False)] * len(requests)  # type: ignore[method-assign]
    answers = ask(journal, certain, requests(1))
    assert ask(journal, Counter(), requests(1)) == answers == [(float("-inf"), False)] * 3


def test_progress_counts_documents_and_truncation_is_remembered(
    journal: Path, recorder: Any
) -> None:
    for _ in range(2):
        lm = JournaledLM(Counter(), journal, {}, progress=recorder)
        lm.loglikelihood(requests(RANGE + 1))
        assert lm.truncated == 2  # of two ranges, by `Counter.answer`
    assert recorder.totals == recorder.done == {"documents": 2 * (RANGE + 1)}


def test_images_are_part_of_the_question(journal: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    def asked(shade: int) -> Any:
        shown = {"visual": [image.new("RGB", (4, 4), (shade, 0, 0))]}
        return [Instance("generate_until", {}, ("<image>?", {}, shown), 0, ("t", 0, 1))]

    made = Counter()
    first, other, again = (
        ask(journal, made, asked(shade), "generate_until", images=True) for shade in (1, 2, 1)
    )
    assert made.made == 2
    assert first == again
    assert first != other
    assert not hasattr(JournaledLM(made, journal, {}), "MULTIMODAL")
