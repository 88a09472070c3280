"""The command line as users start it: real processes, real exit codes, real time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RunCli = Callable[..., subprocess.CompletedProcess[str]]


def test_compress_and_verify(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_cli(
        "compress", "--recipe", "lossless.yaml", "--output-dir", out, "--json", tiny_llama
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["class"] == "lossless"
    assert run_cli("verify", "--against", tiny_llama, out).returncode == 0
    done = run_cli("verify", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


def test_the_same_command_twice(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    args = ("compress", "--recipe", "lossless.yaml", "--output-dir", tmp_path / "out", tiny_llama)
    assert run_cli(*args).returncode == 0
    done = run_cli(*args)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_help_is_quick() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, ROOT / "cli.py", "--help"], check=True, capture_output=True, cwd=ROOT
        )
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3


def test_a_full_disk_ends_with_3(run_cli: RunCli, tiny_llama: Path, tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    args = ("compress", "--recipe", "lossless.yaml", "--output-dir", tmp_path / "out", tiny_llama)
    done = run_cli(*args, preexec_fn=limit)
    assert done.returncode == 3
    assert "no room on disk" in done.stderr
    assert not (tmp_path / "out").exists()
