"""Answers of a language model that are kept, so that no question is asked twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from compress.checkpoint import dump_json, load_object, room_needed, write_atomic
from compress.errors import BadInput, EntropressError
from compress.evaluate.chat import as_template_wants
from compress.progress import SILENT, Progress

RANGE = 64  # documents of a task that are answered, and kept, together


class JournaledLM(LM):
    """Asks a language model, which is made by ``make`` when a first answer is missing.

    Requests are asked in ranges: `RANGE` documents of one task at a time, whatever the number of
    documents is, so that a document is in the same batch in every run. Each range has a file in
    ``journal``, whose name is a digest of ``settings``, all that the answers depend on beside the
    requests, and of the requests with the contents of their images. An interrupted run keeps its
    whole ranges; a file that is damaged or another's is written anew. What is random is seeded by
    the requests. ``truncated``: how many requests were cut to fit, by the attribute of that name of
    the language model. ``images``: whether it answers requests with images.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        journal: Path,
        settings: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        progress: Progress = SILENT,
        label: str = "lm-eval",
        images: bool = False,
    ) -> None:
        super().__init__()
        self._make = make
        self._lm: Any = None
        self._journal = journal
        self._settings = dict(settings)
        self._progress = progress
        self._label = label
        self._images = images
        if images:
            self.MULTIMODAL = True  # lm-eval asks for its presence as well
        self.truncated = 0
        self.tokenizer = tokenizer
        self.chat_template_args: dict[str, Any] = {}

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return self._answer("generate_until", requests)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """HFLM's, which needs the tokenizer only, with messages as its template wants them."""
        from lm_eval.models.huggingface import HFLM

        history = as_template_wants(self.tokenizer, chat_history, images=self._images)
        return HFLM.apply_chat_template(self, history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        return self._settings

    def _answer(self, kind: str, requests: list[Any]) -> list[Any]:
        ranges: dict[tuple[str, int], list[int]] = {}
        for place, request in enumerate(requests):
            ranges.setdefault((request.task_name, request.doc_id // RANGE), []).append(place)
        answers: list[Any] = [None] * len(requests)
        documents = len({(request.task_name, request.doc_id) for request in requests})
        with self._progress.step(self._label, documents, "documents") as step:
            for (task, _), places in ranges.items():
                asked = [requests[place] for place in places]
                for place, answer in zip(places, self._range(kind, task, asked), strict=True):
                    answers[place] = answer
                step.advance(len({request.doc_id for request in asked}))
        return answers

    def _range(self, kind: str, task: str, asked: list[Any]) -> list[Any]:
        """The answers of one range, from its file or the language model."""
        questions = [kind, task, [request.args for request in asked]]
        digest = _digest([self._settings, *questions])
        path = self._journal / f"{digest}.json"
        entry = _read(path, digest, kind, len(asked))
        if entry is None:
            # Of the questions alone: two models that are the same must draw the same samples.
            seed = int(_digest([self._settings.get("seed"), *questions])[:15], 16)
            entry = self._ask(kind, task, asked, digest, seed)
            with room_needed(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                own = path.with_name(f"{digest}.{os.getpid()}")  # others may be writing the same
                write_atomic(own, dump_json(entry))
                own.replace(path)
        self.truncated += entry["truncated"]
        return [tuple(a) if isinstance(a, list) else a for a in entry["answers"]]

    def _ask(
        self, kind: str, task: str, asked: list[Any], digest: str, seed: int
    ) -> dict[str, Any]:
        import torch

        if self._lm is None:
            self._lm = self._make()
        torch.manual_seed(seed)
        cut = self._lm.truncated
        answers = getattr(self._lm, kind)(asked, disable_tqdm=True)
        answers = [list(a) if isinstance(a, tuple) else a for a in answers]
        if not _well_formed(answers, kind, len(asked)):
            raise BadInput("the model's log-likelihoods are not numbers", where=task)
        return {
            "requests": digest,
            "answers": answers,
            "sha256": _digest(answers),
            "truncated": self._lm.truncated - cut,
        }


def _read(path: Path, digest: str, kind: str, count: int) -> dict[str, Any] | None:
    """What a range's file holds; None where there is none that can be trusted."""
    if not path.is_file():
        return None
    try:
        entry = load_object(path)
    except EntropressError:
        return None
    answers = entry.get("answers")
    sound = (
        entry.get("requests") == digest
        and _well_formed(answers, kind, count)
        and entry.get("sha256") == _digest(answers)
        and type(entry.get("truncated")) is int
    )
    return entry if sound else None


def _well_formed(answers: Any, kind: str, count: int) -> bool:
    if not isinstance(answers, list) or len(answers) != count:
        return False
    if kind == "generate_until":
        return all(isinstance(answer, str) for answer in answers)
    if kind == "loglikelihood_rolling":
        return all(_is_number(answer) for answer in answers)
    return all(
        isinstance(answer, list)
        and len(answer) == 2
        and _is_number(answer[0])
        and isinstance(answer[1], bool)
        for answer in answers
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=_image_digest)
    return hashlib.sha256(text.encode()).hexdigest()


def _image_digest(image: Any) -> str:
    """Of a PIL image's pixels, which is all that is not plain data in a request."""
    from lm_eval.utils import convert_pil_to_hash

    return str(convert_pil_to_hash(image))
