"""Whole evaluations of tiny models, through lm-eval."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress import checkpoint as room
from compress.errors import BadInput
from compress.evaluate import EvalOptions, reference_journal, run_tasks, same_responses, save
from compress.evaluate.identity import model_identity

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
ALL = ("tiny_group", "tiny_likelihood", "tiny_rolling", "tiny_generate")

pytestmark = pytest.mark.usefixtures("own_cache", "hasty")


@pytest.fixture
def model(tiny_llama: Path) -> room.Checkpoint:
    return room.open(tiny_llama)


def options(tasks: str, *names: str, **more: Any) -> EvalOptions:
    return EvalOptions(**{"tasks": names or ALL, "include_path": tasks, **more})


def theirs(model: Any, names: tuple[str, ...], place: str, **more: Any) -> dict[str, Any]:
    """The same by lm-eval alone."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(str(model), device="cpu", batch_size=8, softmax_dtype="float32")
    manager = TaskManager(include_path=place, include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=manager, **more)


def test_the_results_are_lm_evals_own(model: room.Checkpoint, tasks: str, tmp_path: Path) -> None:
    names = ("tiny_choice", "tiny_likelihood", "tiny_rolling")
    more: dict[str, Any] = {"limit": 20, "num_fewshot": 1}
    got = run_tasks(model, options(tasks, *names, **more), tmp_path / "journal").results
    for name in names:  # lm-eval alone would put several tasks into one batch
        expected = theirs(model.path, (name,), tasks, bootstrap_iters=1000, **more)
        for key in ("results", "samples", "versions", "n-shot", "n-samples", "configs"):
            assert got[key][name] == expected[key][name], key
    assert got["results"]["tiny_choice"]["sample_len"] == 20
    assert got["config"]["model_args"] == {"pretrained": model.source.id}


class Killed:
    """Interrupts the model at its n-th range."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        from compress.evaluate.lm import EntropressLM

        self.left = n
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            monkeypatch.setattr(EntropressLM, kind, self.counted(getattr(EntropressLM, kind)))

    def counted(self, answer: Any) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return answer(*args, **options)

        return counting


@pytest.mark.parametrize("ranges", [3, 6])
def test_an_interrupted_evaluation_continues_to_the_same_bits(
    ranges: int,
    model: room.Checkpoint,
    tasks: str,
    tmp_path: Path,
    without_date: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_tasks(model, options(tasks), tmp_path / "whole")
    with monkeypatch.context() as patched:
        Killed(patched, ranges)
        with pytest.raises(KeyboardInterrupt):
            run_tasks(model, options(tasks), tmp_path / "journal")
    assert len(list((tmp_path / "journal").glob("*.json"))) == ranges
    resumed = run_tasks(model, options(tasks), tmp_path / "journal")
    assert same_responses(whole, resumed) == []
    assert without_date(resumed.results) == without_date(whole.results)
    sampled = whole.results["samples"]["tiny_generate"]
    assert all(len(sample["resps"][0]) == 2 for sample in sampled)  # its `repeats`
    assert any(len(set(sample["resps"][0])) == 2 for sample in sampled)


def test_a_finished_evaluation_needs_no_model(
    model: room.Checkpoint, tasks: str, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = reference_journal(model)
    assert journal.name == model_identity(model)
    first = run_tasks(model, options(tasks), journal, progress=recorder)
    monkeypatch.setattr(room.Checkpoint, "load_model", None)
    second = run_tasks(model, options(tasks), journal)
    assert same_responses(first, second) == []
    assert recorder.totals["documents"] == recorder.done["documents"] == 70 + 20 + 70 + 20 + 6
    fewer = run_tasks(model, options(tasks, "tiny_choice", limit=64), journal)
    assert len(fewer.results["samples"]["tiny_choice"]) == 64


def test_it_is_silent_and_leaves_things_as_they_were(
    model: room.Checkpoint, make_task: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm.std import tqdm

    body = """
output_type: loglikelihood
doc_to_text: question
doc_to_target: word
metric_list: [{metric: perplexity}]
"""
    directory = make_task(tmp_path / "tasks", "tiny_loud", body)
    loader = directory / "tiny_data.py"
    loader.write_text("print('loaded')\n" + loader.read_text())
    logger = logging.getLogger("lm_eval")
    before = tqdm.__init__, logger.level
    capfd.readouterr()
    run_tasks(model, options(str(directory), "tiny_loud"), tmp_path / "journal")
    assert capfd.readouterr() == ("", "")
    assert (tqdm.__init__, logger.level) == before


def test_prompts_that_are_cut_are_told_of(
    model: room.Checkpoint, make_task: Any, tmp_path: Path, recorder: Any
) -> None:
    body = """
output_type: loglikelihood
doc_to_text: "{{question * 20}}"
doc_to_target: word
"""
    directory = make_task(tmp_path / "tasks", "tiny_long", body)
    asked = options(str(directory), "tiny_long", limit=3)
    for _ in range(2):  # the second time from the journal
        run_tasks(model, asked, tmp_path / "journal", progress=recorder)
    assert recorder.notes == ["tiny: 3 requests were cut from the left to fit"] * 2


def test_chat_templates(tiny_llama: Path, tasks: str, tmp_path: Path) -> None:
    asked = options(tasks, "tiny_choice", limit=3, apply_chat_template=True, num_fewshot=1)
    with pytest.raises(BadInput, match="its tokenizer has no chat template"):
        run_tasks(room.open(tiny_llama), asked, tmp_path / "journal")
    chatty = tmp_path / "chatty"
    shutil.copytree(tiny_llama, chatty)
    (chatty / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    got = run_tasks(room.open(chatty), asked, tmp_path / "journal").results
    prompt = got["samples"]["tiny_choice"][0]["arguments"][0][0]
    assert prompt.startswith("<u>Is ")
    assert prompt.endswith("even? <a>")
    more = {"limit": 3, "apply_chat_template": True, "num_fewshot": 1}
    expected = theirs(chatty, ("tiny_choice",), tasks, bootstrap_iters=0, **more)
    assert got["samples"] == expected["samples"]


def test_nan_weights_are_one_line(tiny_llama: Path, tasks: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][7] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    for name in ALL:
        with pytest.raises(BadInput, match="broken: the model's logits are not finite, got nan"):
            run_tasks(room.open(broken), options(tasks, name, limit=2), tmp_path / "journal")
    assert not (tmp_path / "journal").exists()


def test_bad_options(model: room.Checkpoint, tasks: str, make_task: Any, tmp_path: Path) -> None:
    for limit in (0, -1, 2.5, float("inf"), float("nan")):
        with pytest.raises(BadInput, match=f"no such number of documents, got {limit}"):
            options(tasks, limit=limit)
    with pytest.raises(BadInput, match="no such batch size"):
        options(tasks, batch_size=0)
    journal = tmp_path / "journal"
    with pytest.raises(BadInput, match="there is no such device here, got toaster"):
        run_tasks(model, options(tasks, device="toaster"), journal)
    with pytest.raises(BadInput, match="tiny_other: lm-eval cannot run it: ValueError: Sample"):
        run_tasks(model, options(tasks, "tiny_other", num_fewshot=21), journal)
    late = "output_type: loglikelihood\ndoc_to_text: '{{[1][answer]}}'\ndoc_to_target: word\n"
    directory = str(make_task(tmp_path / "tasks", "tiny_late", late))
    with pytest.raises(BadInput, match="tiny_late: lm-eval cannot run it: UndefinedError"):
        run_tasks(model, options(directory, "tiny_late"), journal)


def test_a_share_of_the_documents(model: room.Checkpoint, tasks: str, tmp_path: Path) -> None:
    found = run_tasks(model, options(tasks, "tiny_choice", limit=0.1), tmp_path / "journal")
    assert found.results["n-samples"]["tiny_choice"] == {"original": 70, "effective": 7}


def test_saved_files_are_lm_evals_own(model: room.Checkpoint, tasks: str, tmp_path: Path) -> None:
    from lm_eval.utils import (
        get_file_task_name,
        get_results_filenames,
        get_sample_results_filenames,
        make_table,
    )

    found = run_tasks(model, options(tasks, "tiny_group", limit=5), tmp_path / "journal")
    untouched = json.dumps(found.results, default=str)
    (results,) = save(found, tmp_path / "few", log_samples=False)
    files = save(found, tmp_path / "all", log_samples=True)
    assert json.dumps(found.results, default=str) == untouched
    assert results.parent == tmp_path / "few" / "tiny"
    names = [str(file) for file in files]
    assert get_results_filenames(names) == names[:1]
    assert {get_file_task_name(Path(name).name) for name in names[1:]} == {
        *("tiny_choice", "tiny_other")
    }
    assert get_sample_results_filenames(names) == names[1:]
    document = json.loads(results.read_text())
    assert document["results"] == found.results["results"]
    assert document["model_source"] == "entropress"
    assert set(document["task_hashes"]) == {"tiny_choice", "tiny_other"}
    assert "tiny_choice" in make_table(document)
    assert "samples" not in document
    samples = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == list(range(5))


def test_files_that_cannot_be_written_are_told_of(
    model: room.Checkpoint, tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_tasks(model, options(tasks, "tiny_choice", limit=2), tmp_path / "journal")
    with pytest.raises(BadInput, match="name a directory"):
        save(found, tmp_path / "results.json", log_samples=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file/tiny: cannot be made: Not a directory"):
        save(found, tmp_path / "file", log_samples=False)
    monkeypatch.setattr(Path, "write_text", None)  # lm-eval would only log it
    with pytest.raises(BadInput, match="results_.*json: lm-eval could not write it"):
        save(found, tmp_path / "out", log_samples=False)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared tasks are not here")
def test_smollm2_on_the_shared_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENTROPRESS_CACHE")  # of the converted demonstration model
    try:
        model = room.open(room.resolve("demo:smollm2-135m"))
    except Exception as error:
        pytest.skip(str(error))
    asked = EvalOptions(
        ("local_arc_easy", "local_lambada_openai"), str(SHARED / "tasks"), limit=10, dtype="float32"
    )
    found = run_tasks(model, asked, tmp_path / "journal")
    scores = found.results["results"]
    assert scores["local_arc_easy"]["acc,none"] == pytest.approx(0.8)
    assert scores["local_arc_easy"]["acc_norm,none"] == pytest.approx(0.4)
    assert 0 < scores["local_lambada_openai"]["perplexity,none"] < 1000
    assert same_responses(found, run_tasks(model, asked, tmp_path / "journal")) == []
