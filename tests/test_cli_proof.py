"""eval, report and gates through the command line: what is printed, written, and the exit code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner, Result

from compress.checkpoint import read_manifest
from compress.main import cli

ROOT = Path(__file__).resolve().parent.parent
Cli = Callable[..., Result]
LOSSLESS = ("compress", "--recipe", "lossless.yaml", "--output-dir", "out")


@pytest.fixture
def run() -> Cli:
    return lambda *args: CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def model(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for the shipped tasks: its tokens are single bytes."""
    directory = tmp_path_factory.mktemp("models") / "roomy"
    return make_llama(directory, max_position_embeddings=512)


def test_eval_prints_lm_evals_scores_and_writes_its_files(
    run: Cli, here: Path, model: Path
) -> None:
    args = ("--tasks", "entropress_facts", "--limit", 12, "--output", "results", "--log-samples")
    result = run("eval", "--json", *args, model)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    scores = found["results"]["results"]["entropress_facts"]
    assert 0 <= scores["acc,none"] <= 1
    assert found["gates"] == []
    written = [Path(file) for file in found["files"]]
    assert [file.suffix for file in written] == [".json", ".jsonl"]
    saved = json.loads(written[0].read_text())
    assert saved["results"]["entropress_facts"]["acc,none"] == scores["acc,none"]
    assert len(written[1].read_text().splitlines()) == 12
    assert not list((here / "cache" / "evaluations").iterdir())


def test_eval_gates_on_a_paired_drop(run: Cli, here: Path, model: Path) -> None:
    assert run(*LOSSLESS, model).exit_code == 0
    args = ("eval", "--tasks", "entropress_facts", "--limit", 20, "--baseline", model)
    result = run(*args, "--max-drop", 0.3, "--record", "out")
    assert result.exit_code == 0, result.output
    assert "gate lm_eval: PASSED: entropress_facts acc" in result.stdout
    [gate] = read_manifest(Path("out"))["gates"]
    assert gate["rows"][0]["value"] == 0
    result = run(*args, "--max-drop", 0.01, "--junit", "gates.xml", "out")
    assert result.exit_code == 1
    assert "UNDECIDED" in result.stdout
    assert "about 381 documents would decide" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        "error: out: 1 of 1 gates did not pass: lm_eval undecided"
    )
    assert ElementTree.parse("gates.xml").getroot().attrib["failures"] == "1"
    assert read_manifest(Path("out"))["gates"] == [gate]


def test_a_recipes_gates_decide_the_exit_code(run: Cli, here: Path, tiny_llama: Path) -> None:
    text = here / "text.txt"
    text.write_text("\n\n".join(f"{i} sheep went up a hill. " * 300 for i in range(12)))
    claims = (
        f"gates=[{{perplexity: {{data: {text}, length: 64, documents: 12, max_ratio: LIMIT}}}}]"
    )
    args = (*LOSSLESS, "--overwrite", "--junit", "gates.xml", tiny_llama)
    result = run(*args, "--set", claims.replace("LIMIT", "1"))
    assert result.exit_code == 0, result.output
    assert "gate perplexity: PASSED" in result.stdout
    result = run(*args, "--set", claims.replace("LIMIT", "0.9"))
    assert result.exit_code == 1
    assert "0.1 too much (12 documents)" in result.stdout
    assert "gate perplexity: FAILED" in run("inspect", "--no-entropy", "out").stdout
    assert run("verify", "out").exit_code == 0
    document = json.loads(run("inspect", "--json", "out").stdout)
    assert document["manifest"]["gates"][0]["verdict"] == "failed"


def test_a_recipe_of_gates_needs_the_original(run: Cli, here: Path, tiny_llama: Path) -> None:
    assert run(*LOSSLESS, tiny_llama).exit_code == 0
    result = run("eval", "--recipe", "gates.yaml", "out")
    assert result.exit_code == 2
    assert "give --baseline" in result.stderr


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("--tasks", "entropress_fact"), "did you mean entropress_facts"),
        ((), "nothing to evaluate; give --tasks, or --recipe with gates"),
        (("--tasks", "entropress_facts", "--max-drop", "0.1"), "give --baseline and --tasks"),
        (("--tasks", "x", "--include-path", "nowhere"), "no such directory of task files"),
        (("--tasks", "entropress_facts", "--record"), "no gate to record"),
        (("--recipe", "gates.yaml", "--record"), "only a checkpoint made by entropress"),
        (("--tasks", "entropress_facts", "--log-samples"), "give --output as well"),
        (("--tasks", "entropress_facts", "--junit", "no/x.xml"), "no/x.xml: cannot be written"),
        (("--tasks", "entropress_facts", "--limit", "inf"), "no such number of documents"),
        (("--tasks", "entropress_facts", "--device", "meta"), "nothing can be computed there"),
        (("--tasks", "entropress_facts", "--metric", "accc"), "did you mean 'acc'"),
        (("--tasks", "entropress_facts", "--device", "cuda"), "there is no such device here"),
        (("--tasks", "entropress_facts", "--baseline", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    run: Cli, here: Path, tiny_llama: Path, args: tuple[str, ...], complaint: str
) -> None:
    result = run("eval", *args, tiny_llama)
    assert result.exit_code in (2, 3)
    assert complaint in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("hashing")]
    assert len(lines) == 1


def test_a_model_is_no_baseline_of_itself(run: Cli, here: Path, model: Path) -> None:
    args = ("--tasks", "entropress_facts", "--max-drop", 0.5, "--baseline", model)
    result = run("eval", *args, model)
    assert result.exit_code == 2
    assert "the baseline is the model itself" in result.stderr


def test_a_candidate_that_cannot_answer_fails_its_gate(run: Cli, here: Path, model: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, "broken")
    weights = load_file("broken/model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, "broken/model.safetensors", {"format": "pt"})
    args = ("--tasks", "entropress_facts", "--limit", 2, "--max-drop", 1, "--junit", "gates.xml")
    result = run("eval", *args, "--baseline", model, "broken")
    assert result.exit_code == 1
    assert "gate lm_eval: FAILED: broken: the model's logits are not finite" in result.stdout
    assert ElementTree.parse("gates.xml").getroot().attrib["failures"] == "1"


def test_report_beside_the_model_leaves_it_verified(run: Cli, here: Path, model: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(*LOSSLESS, model).exit_code == 0
    result = run("report", "out")
    assert result.exit_code == 0, result.output
    assert "wrote out/report.html" in result.stdout
    assert run("verify", "--against", model, "out").exit_code == 0
    assert run("report", "--output", "elsewhere", "out").exit_code == 0
    assert Path("elsewhere/README.md").read_text() == Path("out/README.md").read_text()


def test_the_workflow_for_users_runs(
    here: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of docs/ci/compress.yml, on a model so small that nothing is known of it."""
    pytest.importorskip("matplotlib")
    workflow = yaml.safe_load((ROOT / "docs" / "ci" / "compress.yml").read_text())
    shutil.copy(ROOT / "recipes" / "lossless.yaml", "recipe.yaml")
    steps = [step["run"] for step in workflow["jobs"]["compress"]["steps"] if "run" in step]
    commands = [step.split()[1:] for step in steps if step.startswith("entropress ")]
    assert [command[0] for command in commands] == ["compress", "verify", "eval", "report"]
    for command in commands:
        arguments = [str(model) if word == '"$MODEL"' else word for word in command]
        if command[0] == "eval":  # a model that says nothing needs no more to be told apart
            arguments += ["--limit", "30", "--max-drop", "0.2"]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    upload = workflow["jobs"]["compress"]["steps"][-1]["with"]["path"].split()
    assert [path for path in upload if not Path(path).exists()] == []


def test_every_option_of_eval_is_described(run: Cli) -> None:
    text = run("eval", "--help").stdout
    for option in ("--tasks", "--include-path", "--limit", "--num-fewshot", "--batch-size"):
        assert re.search(rf"{option} \S+ +\S", text), option


def test_eval_needs_no_network(run: Cli, here: Path, tiny_llama: Path) -> None:
    result = run("eval", "--tasks", "arc_easy", tiny_llama)
    assert result.exit_code == 3
    assert "its documents are on the hub, which cannot be reached" in result.stderr
