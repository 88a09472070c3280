"""Every command through its public door: what it prints, where, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from compress import __version__
from compress.checkpoint import MANIFEST
from compress.main import cli

QUICK = ("--set", "calibration.sequences=2", "--set", "calibration.length=64")
Cli = Callable[..., Result]


@pytest.fixture
def run() -> Cli:
    return lambda *args: CliRunner().invoke(cli, [str(arg) for arg in args])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_main_road(run: Cli, here: Path, tiny_llama: Path) -> None:
    assert run("compress", "--recipe", "lossless.yaml", tiny_llama).exit_code == 0
    assert (here / "tiny-lossless" / MANIFEST).is_file()
    result = run("verify", "--against", tiny_llama, "tiny-lossless")
    assert result.exit_code == 0
    assert "equal those of tiny bit for bit" in result.stdout
    assert run("decompress", "tiny-lossless", "dense").exit_code == 0
    result = run("inspect", "tiny-lossless")
    assert result.exit_code == 0
    assert "self_attn.q_proj" in result.stdout
    assert "lossless, made from tiny" in result.stdout


def test_verify_says_what_it_did_not_compare(run: Cli, here: Path, tiny_llama: Path) -> None:
    args = ("--recipe", "lossless.yaml", "--set", "model.dtype=float16", "--output-dir", "out")
    assert run("compress", *args, tiny_llama).exit_code == 0
    result = run("verify", "--against", tiny_llama, "out")
    assert result.exit_code == 0
    assert "not compared, since a stage changed them: 57 tensors, lm_head" in result.stdout
    assert "0 tensors equal those of tiny bit for bit" in result.stdout
    found = document(run("verify", "--json", "--against", tiny_llama, "out"))
    assert len(found["not_compared"]) == found["tensors"] == 57


def test_json_is_one_document_on_stdout(run: Cli, here: Path, tiny_llama: Path) -> None:
    args = ("--recipe", "lossless.yaml", "--json")
    planned = document(run("compress", "--dry-run", *args, tiny_llama))
    assert list(here.iterdir()) == []
    done = document(run("compress", "--output-dir", "out", *args, tiny_llama))
    assert done["bytes_out"] == pytest.approx(planned["bytes_out"], rel=0.005)
    assert done["class"] == "lossless"
    assert document(run("verify", "--json", "out"))["ok"] is True
    assert document(run("inspect", "--json", "out"))["total"]["tensors"] > 30
    assert document(run("decompress", "--json", "out", "dense")) == {"path": "dense"}
    assert document(run("doctor", "--json"))["codec"]["ok"] is True


def test_overrides_reach_the_output(run: Cli, here: Path, tiny_llama: Path) -> None:
    args = ("--recipe", "entropy_prune.yaml", "--set", "stages.prune_blocks.drop=1", *QUICK)
    done = document(run("compress", *args, "--json", "--output-dir", "out", tiny_llama))
    assert done["recipe"]["stages"][0]["prune_blocks"]["drop"] == 1
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--recipe", "lossless.yaml", "./nowhere"], 2, "nowhere: no such directory"),
        (["--recipe", "loseless.yaml", "MODEL"], 2, "no such recipe"),
        (["--recipe", "bad.yaml", "MODEL"], 2, "did you mean 'calibration'?"),
        (["--recipe", "lossless.yaml", "--set", "model.dtype=int3", "MODEL"], 2, "got 'int3'"),
        (["--recipe", "lossless.yaml", "--output-dir", "full", "MODEL"], 2, "the output exists"),
        (["--recipe", "lossless.yaml", "--resume", "--overwrite", "MODEL"], 2, "exclude"),
        (["--recipe", "lossless.yaml", "empty"], 2, "empty"),
        (["--recipe", "lossless.yaml", "pickle"], 2, "convert"),
        (["--recipe", "lossless.yaml", "demo:unknown"], 2, "demo"),
        (["--recipe", "lossless.yaml", "org/model"], 3, "HF_HUB_OFFLINE"),
        (["--recipe", "lossless.yaml"], 2, "Missing argument"),
        (["MODEL"], 2, "Missing option '--recipe'"),
        (["--recipe", "lossless.yaml", "--ouput-dir", "x", "MODEL"], 2, "No such option"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Cli, here: Path, tiny_llama: Path, args: list[str], code: int, message: str
) -> None:
    for name in ("empty", "full", "pickle"):
        (here / name).mkdir()
    (here / "full" / "file").write_text("x")
    (here / "pickle" / "config.json").write_text("{}")
    (here / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    (here / "bad.yaml").write_text("version: 1\ncalibraton: {}\nstages: [encode_weights]\n")
    before = sorted(here.rglob("*"))
    result = run("compress", *[str(tiny_llama) if arg == "MODEL" else arg for arg in args])
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert sorted(here.rglob("*")) == before
    if not result.stderr.startswith("Usage"):
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_a_broken_checkpoint_ends_with_1(run: Cli, here: Path, tiny_llama: Path) -> None:
    run("compress", "--recipe", "lossless.yaml", "--output-dir", "out", tiny_llama)
    shard = here / "out" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    result = run("verify", "--json", "out")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert "model.safetensors" in result.stderr
    assert run("decompress", "out", "dense").exit_code == 1
    assert not (here / "dense").exists()
    assert run("verify", "--against", tiny_llama, tiny_llama).exit_code == 1


def test_v_shows_where_an_error_arose(run: Cli, here: Path) -> None:
    for args in (("-v", "inspect", "./nowhere"), ("inspect", "-v", "./nowhere")):
        result = run(*args)
        assert result.exit_code == 2
        assert result.stderr.startswith("Traceback")
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_bug_is_told_from_bad_input(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.evaluate import doctor

    monkeypatch.setattr(doctor, "diagnose", lambda *_: 1 / 0)
    result = run("doctor")
    assert result.exit_code == 70
    assert result.stderr.startswith("internal error: ZeroDivisionError: division by zero; run")


def test_an_interrupt_says_how_to_go_on(
    run: Cli, here: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.stages import encode_weights

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    args = ("compress", "--recipe", "lossless.yaml", "--output-dir", "out", tiny_llama)
    with monkeypatch.context() as patch:
        patch.setattr(encode_weights, "rewrite", interrupt)
        result = run(*args)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert run(*args).exit_code == 2
    assert run(*args[:-1], "--resume", args[-1]).exit_code == 0


def test_doctor_names_what_is_missing_and_how_to_mend_it(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.evaluate import doctor

    assert run("doctor").exit_code == 0
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "rich" else real(name))
    result = run("doctor")
    assert result.exit_code == 3
    assert result.stderr == "error: rich: not installed; pip install rich\n"


def test_the_version(run: Cli) -> None:
    assert run("--version").stdout == f"entropress, version {__version__}\n"


def test_measure_shows_the_scores_and_who_agrees(run: Cli, here: Path, tiny_llama: Path) -> None:
    quick = ("--sequences", 3, "--length", 64, tiny_llama)
    result = run("measure", *quick)
    assert result.exit_code == 0, result.output
    header, *lines = result.stdout.splitlines()
    assert header.split() == [
        *("block", "knn_entropy", "bucket_entropy", "cosine"),
        "norm_ratio",
        "note",
    ]
    assert [line.split()[0] for line in lines[:6]] == list("012345")
    assert sum(line.startswith("rank correlation ") for line in lines) == 6
    few = run("measure", "--signals", "cosine,norm_ratio", *quick)
    assert few.stdout.splitlines()[0].split() == ["block", "cosine", "norm_ratio", "note"]
    assert sorted(document(run("measure", "--json", *quick))["orders"]["cosine"]) == [2, 3, 4]
    (here / "text.jsonl").write_text('{"text": "too short"}\n')
    assert "too short" in run("measure", "--data", "text.jsonl", *quick).stderr
    assert "did you mean 'cosine'" in run("measure", "--signals", "cosin", *quick).stderr
