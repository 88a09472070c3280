"""Each gate on a model that must pass it and on one that must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress import checkpoint as room
from compress import gates
from compress.errors import BadInput
from compress.gates import GateResult, Subject


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def check(tiny_llama: Path, tmp_path: Path) -> Any:
    def run(candidate: Path, name: str, **options: Any) -> GateResult:
        gate = gates.get(name)
        config = gate.Config.model_validate(options)
        reference = room.open(tiny_llama)
        gate.plan(reference, config)
        return gate.check(Subject(reference, room.open(candidate), tmp_path / "answers"), config)

    return run


def test_bit_exact_passes_on_the_lossless_output(check: Any, lossless: Path, tasks: str) -> None:
    found = check(lossless, "bit_exact", tasks=["tiny_choice"], include_path=tasks)
    assert found.verdict == "passed"
    assert [(row.name, row.value, row.documents) for row in found.rows] == [
        ("tensors", 0, 57),
        ("files", 0, 4),
        ("logits", 0, 4),
        ("responses", 0, 20),
    ]
    assert "every bit the same" in found.summary


def test_bit_exact_fails_on_other_weights(check: Any, pruned: Path, tasks: str) -> None:
    found = check(pruned, "bit_exact", tasks=["tiny_choice"], include_path=tasks)
    assert found.verdict == "failed"
    values = {row.name: row.value for row in found.rows}
    assert values["tensors"] >= 18  # two blocks of nine, and those that moved up
    assert values["files"] == 1
    assert values["logits"] == 4
    assert values["responses"] > 0
    assert "1 of 4 files differ (config.json first)" in found.summary


def test_bit_exact_needs_no_manifest_but_every_byte(
    check: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    (copy / "README.md").write_text("a card is not compared")
    assert check(copy, "bit_exact").verdict == "passed"
    (copy / "chat_template.jinja").write_text("hello")
    found = check(copy, "bit_exact", prompts=0)
    assert found.summary == "1 of 5 files differ (chat_template.jinja first)"


def test_bit_exact_needs_a_tokenizer_for_prompts_only(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    gate, reference = gates.get("bit_exact"), room.open(bare)
    gate.plan(reference, gate.Config(prompts=0))
    with pytest.raises(BadInput, match="no tokenizer"):
        gate.plan(reference, gate.Config())


def test_perplexity_of_equal_models_is_a_ratio_of_one(
    check: Any, lossless: Path, text: str
) -> None:
    found = check(lossless, "perplexity", data=text, length=64, max_ratio=1.0)
    [row] = found.rows
    assert found.verdict == "passed"
    assert (row.value, row.low, row.high, row.documents) == (1, 1, 1, 12)
    assert row.reference == row.candidate


def test_perplexity_says_by_how_much(check: Any, pruned: Path, text: str) -> None:
    found = check(pruned, "perplexity", data=text, length=64, max_ratio=0.5)
    [row] = found.rows
    assert found.verdict == "failed"
    assert row.low < row.value < row.high
    assert row.value == pytest.approx(row.candidate / row.reference)
    assert f"{row.value - 0.5:.3g} too much (12 documents)" in found.summary
    assert check(pruned, "perplexity", data=text, length=64, max_ratio=2).verdict == "passed"


def test_between_estimate_and_interval_a_gate_is_undecided(
    check: Any, pruned: Path, text: str
) -> None:
    [row] = check(pruned, "perplexity", data=text, length=64, max_ratio=9).rows
    limit = (row.value + row.high) / 2
    found = check(pruned, "perplexity", data=text, length=64, max_ratio=limit)
    assert found.verdict == "undecided"
    assert "the interval reaches beyond by" in found.summary


def test_divergence(check: Any, lossless: Path, pruned: Path, text: str) -> None:
    same = check(lossless, "divergence", data=text, length=64, max_jsd=1e-9, max_kl=1e-9)
    assert same.verdict == "passed"
    assert same.details["top1_agreement"] == [1, 1, 1]
    other = check(pruned, "divergence", data=text, length=64, max_jsd=1e-9, max_kl=100)
    assert other.verdict == "failed"
    assert {row.name: row.verdict for row in other.rows} == {"kl": "passed", "jsd": "failed"}
    assert "jsd" in other.summary
    assert other.details["kl"][0] > 0


def test_divergence_needs_a_bound() -> None:
    with pytest.raises(ValueError, match="give max_kl or max_jsd"):
        gates.get("divergence").Config()


def test_lm_eval_of_equal_models_still_needs_documents(
    check: Any, lossless: Path, tasks: str
) -> None:
    options = {"tasks": ["tiny_choice"], "include_path": tasks}
    found = check(lossless, "lm_eval", max_drop=0.01, **options)
    [row] = found.rows
    assert (row.value, row.documents, found.verdict) == (0, 24, "undecided")
    assert "about 381 documents would decide" in found.summary
    assert check(lossless, "lm_eval", max_drop=0.2, **options).verdict == "passed"


def test_lm_eval_compares_document_by_document(check: Any, pruned: Path, tasks: str) -> None:
    found = check(pruned, "lm_eval", tasks=["tiny_choice"], include_path=tasks, max_drop=1.0)
    [row], [details] = found.rows, found.details.values()
    assert found.verdict == "passed"
    assert row.value == pytest.approx(row.reference - row.candidate)
    assert details["lost"] - details["won"] == round(24 * row.value)
    assert details["method"] == "tango"


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("perplexity", {"data": "nowhere.txt", "max_ratio": 1}, "no such file"),
        ("divergence", {"data": "nowhere.txt", "max_kl": 1}, "no such file"),
        ("lm_eval", {"tasks": ["entropress_fact"], "max_drop": 0}, "entropress_facts"),
        ("bit_exact", {"tasks": ["entropress_fact"]}, "entropress_facts"),
    ],
)
def test_what_can_be_known_before_is_said_before(
    tiny_llama: Path, name: str, options: dict[str, Any], complaint: str
) -> None:
    gate = gates.get(name)
    with pytest.raises(BadInput, match=complaint):
        gate.plan(room.open(tiny_llama), gate.Config.model_validate(options))


def test_a_path_of_this_machine_is_not_recorded(check: Any, lossless: Path, text: str) -> None:
    found = check(lossless, "perplexity", data=text, length=64, max_ratio=1.0)
    assert found.config["data"] == "heldout.jsonl"


def test_a_candidate_that_cannot_be_compared_has_failed(
    tiny_llama: Path, make_llama: Any, tmp_path: Path, text: str
) -> None:
    """NaN weights give NaN logits: a failed gate that says so, not an error of the run."""
    import torch
    from safetensors.torch import load_file, save_file

    broken = make_llama(tmp_path / "broken", tie_word_embeddings=False)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    spec = gates.get("perplexity").Config(data=text, length=64, max_ratio=9)
    [found] = gates.run_gates(
        [type("Spec", (), {"name": "perplexity", "config": spec})()],
        Subject(room.open(tiny_llama), room.open(broken), tmp_path / "answers"),
    )
    assert found.verdict == "failed"
    assert "NaN logits" in found.summary
