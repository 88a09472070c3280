from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from compress.errors import BadInput, Missing
from compress.evaluate.tasks import load_tasks

PLAIN = """
output_type: loglikelihood
doc_to_text: question
doc_to_target: word
"""


def test_names_of_all_kinds(tasks: str, capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("lm_eval").level
    found = load_tasks(["tiny_group", "tiny_tag", "tiny_generate", "tiny_group"], tasks)
    assert found.asked == {
        "tiny_group": ["tiny_group"],
        "tiny_tag": ["tiny_likelihood", "tiny_rolling"],
        "tiny_generate": ["tiny_generate"],
    }
    assert sorted(found.leaves) == [
        *("tiny_choice", "tiny_generate", "tiny_likelihood", "tiny_other", "tiny_rolling")
    ]
    assert len(found.built) == 4
    assert len(found.leaves["tiny_choice"].eval_docs) == 70
    assert logging.getLogger("lm_eval").level == level
    assert capfd.readouterr() == ("", "")


def test_what_ships_needs_no_directory() -> None:
    found = load_tasks(["entropress_suite"])
    assert set(found.asked["entropress_suite"]) == set(found.leaves)
    assert "entropress_facts" in found.leaves


def test_an_unknown_name_gets_the_nearest(tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_their_tasks(monkeypatch)
    with pytest.raises(BadInput, match="unknown task 'tiny_choise'; did you mean tiny_choice"):
        load_tasks(["tiny_choise"], tasks)
    with pytest.raises(BadInput, match="unknown task 'zzz'; known: .*entropress_facts.*tiny_tag"):
        load_tasks(["tiny_choice", "zzz"], tasks)
    with pytest.raises(BadInput, match="no tasks given"):
        load_tasks([])
    with pytest.raises(BadInput, match="/nowhere: no such directory of task files"):
        load_tasks(["tiny_choice"], "/nowhere")


def test_a_task_in_two_names_is_refused(tasks: str) -> None:
    with pytest.raises(BadInput, match="task 'tiny_choice' is asked for twice"):
        load_tasks(["tiny_group", "tiny_choice"], tasks)


def test_a_task_without_documents(make_task: Any, tmp_path: Path) -> None:
    directory = make_task(tmp_path / "tasks", "tiny_empty", PLAIN, count=0)
    with pytest.raises(BadInput, match="tiny_empty: has no documents"):
        load_tasks(["tiny_empty"], str(directory))


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("lost", "def load(**_): open('/lost.jsonl')", BadInput, "missing: .*/lost.jsonl"),
        ("far", "def load(**_): raise ConnectionError('offline')", Missing, "on the hub"),
        ("poor", "import no_such_package", Missing, "package that is not there: .*no_such_package"),
        ("odd", "def load(**_): return {}['test']", BadInput, "cannot load it: KeyError: 'test'"),
    ],
)
def test_what_goes_wrong_in_a_loader_is_one_line(
    name: str, text: str, error: Any, message: str, make_task: Any, tmp_path: Path
) -> None:
    directory = make_task(tmp_path / "tasks", f"tiny_{name}", PLAIN)
    (directory / "tiny_data.py").write_text(text)
    with pytest.raises(error, match=f"^tiny_{name}: .*{message}") as caught:
        load_tasks([f"tiny_{name}"], str(directory))
    assert "\n" not in str(caught.value)


def test_a_missing_data_file_of_datasets_own_loader(tmp_path: Path) -> None:
    (tmp_path / "files.yaml").write_text(
        "task: tiny_files\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/none.jsonl}}}}\n{PLAIN}"
    )
    with pytest.raises(BadInput, match="tiny_files: a file that it needs is missing: .*none.jsonl"):
        load_tasks(["tiny_files"], str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("unsafe_code: true", "would run code"),
        ("doc_to_image: word", "shows images, and lm-eval can only generate.*got .*loglikelihood"),
        ("doc_to_audio: word", "needs more than text and images"),
    ],
)
def test_kinds_that_we_do_not_run(line: str, message: str, make_task: Any, tmp_path: Path) -> None:
    directory = make_task(tmp_path / "tasks", "tiny_kind", f"{PLAIN}{line}\n")
    with pytest.raises(BadInput, match=f"tiny_kind: {message}"):
        load_tasks(["tiny_kind"], str(directory))


@pytest.mark.slow
def test_lm_evals_own_tasks_need_the_hub(tasks: str, make_task: Any, tmp_path: Path) -> None:
    with pytest.raises(Missing, match="arc_easy: its documents are on the hub.*HF_HUB_OFFLINE"):
        load_tasks(["arc_easy"])
    with pytest.raises(BadInput, match="unknown task 'arc_esay'; did you mean .*arc_easy"):
        load_tasks(["arc_esay", "tiny_choice"], tasks)
    directory = make_task(tmp_path / "tasks", "tiny_choice", PLAIN)
    (directory / "group.yaml").write_text("group: mixed\ntask: [tiny_choice, arc_easy]\n")
    with pytest.raises(Missing, match="mixed: its documents are on the hub"):  # so it was found
        load_tasks(["mixed"], str(directory))


def _without_their_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own task files, which take ten seconds to read, are not there."""
    from lm_eval.tasks import TaskManager

    create = TaskManager.__init__

    def small(self: Any, *args: Any, **options: Any) -> None:
        create(self, *args, **{**options, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", small)
