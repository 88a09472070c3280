"""Tasks that show images, on tiny random models: the answers are wrong, and always the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import checkpoint as room
from compress import tokens
from compress.errors import BadInput, Missing
from compress.evaluate import EvalOptions, compare_tasks, load_processor, run_tasks, same_responses
from compress.evaluate.vlm import EntropressVLM

pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("own_cache", "hasty")

COLOURS = "entropress_colours"
ANSWERED = 4  # documents
SLOW = pytest.param("tiny_llava_pruned", marks=pytest.mark.slow)


def options(*names: str, **more: Any) -> EvalOptions:
    return EvalOptions(names or (COLOURS,), limit=ANSWERED, batch_size=4, **more)


def said(found: Any, task: str = COLOURS) -> list[str]:
    return [sample["resps"][0][0] for sample in found.results["samples"][task]]


@pytest.mark.parametrize("model", ["tiny_llava", SLOW])
def test_answers_are_those_of_lm_evals_own_type(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Which follows the policy of a coded checkpoint as all that call from_pretrained."""
    import lm_eval
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.tasks import TaskManager

    from compress.evaluate.tasks import SUITE

    path = request.getfixturevalue(model)
    found = run_tasks(room.open(path), options(), tmp_path / "journal")
    theirs = lm_eval.simple_evaluate(
        HFMultimodalLM(str(path), device="cpu", batch_size=4),
        tasks=[COLOURS],
        task_manager=TaskManager(include_path=str(SUITE), include_defaults=False),
        limit=ANSWERED,
        bootstrap_iters=0,
    )
    samples = found.results["samples"][COLOURS]
    assert samples == theirs["samples"][COLOURS]
    assert len(set(said(found))) > 1
    assert found.results["results"][COLOURS]["exact_match,none"] == 0


def test_a_second_time_needs_no_model(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_tasks(room.open(tiny_llava), options(), tmp_path / "one")
    again = run_tasks(room.open(tiny_llava), options(), tmp_path / "two")
    assert same_responses(first, again) == []
    monkeypatch.setattr(room.Checkpoint, "load_model", None)
    kept = run_tasks(room.open(tiny_llava), options(), tmp_path / "one")
    assert kept.results["samples"] == first.results["samples"]


def test_whole_and_pruned_are_compared(
    tiny_llava: Path, tiny_llava_pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: dict[str, tuple[int, ...]] = {}
    generate = EntropressVLM._model_multimodal_generate

    def watched(self: Any, *args: Any, **more: Any) -> Any:
        found = generate(self, *args, **more)
        pruned = tokens.attached(self.model) is not None
        report = tokens.last_report(self.model) if pruned else None
        lengths[str(self.source.path)] = report.lengths if report else ()
        return found

    monkeypatch.setattr(EntropressVLM, "_model_multimodal_generate", watched)
    whole, pruned = (
        run_tasks(room.open(path), options(), tmp_path / "journal")
        for path in (tiny_llava, tiny_llava_pruned)
    )
    assert lengths[str(tiny_llava)] == ()
    first, *later = lengths[str(tiny_llava_pruned)]
    assert later == [first - 64 + 8] * 3
    assert said(whole) != said(pruned)
    (found,) = compare_tasks(whole, pruned, [COLOURS])
    assert found.comparison.documents == ANSWERED
    assert (found.metric, found.comparison.drop.estimate) == ("exact_match,none", 0)


def test_text_is_answered_as_without_images(tiny_llava: Path, tasks: str, tmp_path: Path) -> None:
    """So the journal of the one serves the other."""
    text = ("tiny_choice", "tiny_generate")
    checkpoint = room.open(tiny_llava)
    alone = run_tasks(checkpoint, options(*text, include_path=tasks), tmp_path / "one")
    both = run_tasks(checkpoint, options(*text, COLOURS, include_path=tasks), tmp_path / "two")
    for name in text:
        assert both.results["samples"][name] == alone.results["samples"][name]


def test_a_model_of_text_sees_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="tiny: does not see, and entropress_colours shows images"):
        run_tasks(room.open(tiny_llama), options(), tmp_path / "journal")


def test_a_prompt_is_not_cut_apart_from_its_image(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"with images: does not fit.*and 16 to generate.*<= 100"):
        run_tasks(room.open(tiny_llava), options(max_length=100), tmp_path / "journal")


def test_a_processor_and_its_packages_are_needed(
    tiny_llama: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="tiny: its processor reads no images"):
        load_processor(tiny_llama)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Missing, match=r"its processor needs a package: .*PIL.*entropress\[vision"):
        load_processor(tiny_llava)


PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
    "{% if c.type == 'image' %}(<image>){% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ '' + m.content }}{% endfor %}"


@pytest.mark.parametrize(("template", "shown"), [(PARTS, "[user](<image>)"), (PLAIN, "[user]")])
def test_chat_templates_of_both_kinds(
    template: str, shown: str, tiny_llava: Path, tmp_path: Path, tasks: str
) -> None:
    import shutil

    chatty = tmp_path / "chatty"
    shutil.copytree(tiny_llava, chatty)
    (chatty / "chat_template.jinja").write_text(template)
    asked = options(COLOURS, "tiny_choice", include_path=tasks, apply_chat_template=True)
    found = run_tasks(room.open(chatty), asked, tmp_path / "journal").results["samples"]
    prompts = [found[task][0]["arguments"][0][0] for task in (COLOURS, "tiny_choice")]
    image = shown if template == PARTS else "[user]<image>"
    assert prompts[0].startswith(f"{image}\nWhat colour is the square")
    assert prompts[1] == "[user]Is 0 even? "


def test_documents_that_hold_images_are_known_again(tiny_llava: Path, tmp_path: Path) -> None:
    """lm-eval would know such a document by where in memory its image was."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "held.py").write_text(
        "from datasets import Dataset\n"
        "from PIL import Image\n"
        "def load(**_):\n"
        "    shades = [Image.new('RGB', (64, 64), (40 * i, 0, 0)) for i in range(3)]\n"
        "    rows = [{'picture': shade, 'word': 'dark'} for shade in shades]\n"
        "    return {'test': Dataset.from_list(rows)}\n"
        "def show(document):\n"
        "    return [document['picture']]\n"
    )
    (tmp_path / "tasks" / "held.yaml").write_text(
        "task: tiny_held\ncustom_dataset: !function held.load\noutput_type: generate_until\n"
        "test_split: test\ndoc_to_image: !function held.show\ndoc_to_text: '<image>Shade?'\n"
        "doc_to_target: word\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    asked = options("tiny_held", include_path=str(tmp_path / "tasks"))
    first, second = (
        run_tasks(room.open(tiny_llava), asked, tmp_path / "journal").results["samples"]
        for _ in range(2)
    )
    hashes = [sample["doc_hash"] for sample in first["tiny_held"]]
    assert hashes == [sample["doc_hash"] for sample in second["tiny_held"]]
    assert len(set(hashes)) == 3
    assert len(list((tmp_path / "journal").glob("*.json"))) == 1
    assert "0x" not in json.dumps(first, default=str)
