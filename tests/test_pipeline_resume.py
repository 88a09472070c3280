"""Killed at any point, a run loses nothing: --resume gives the bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from compress import pipeline
from compress.errors import BadInput, Missing
from compress.workspace import workspace_path

# Stages that run no model: torch's threads do not survive the fork that `die_at` is made of.
ONE_STAGE: list[str] = []
TWO_STAGES = ["model.dtype=float32"]
ROOT = Path(__file__).resolve().parent.parent
Contents = Callable[[Path], dict[str, bytes]]
DieAt = Callable[[Callable[[], object], int], bool]


def kill_and_resume(
    model: Path,
    tmp_path: Path,
    overrides: list[str],
    points: list[int],
    die_at: DieAt,
    contents: Contents,
) -> None:
    """Die at each point in turn, going on with --resume each time; then finish and compare."""
    run = partial(pipeline.run, "lossless.yaml", model, overrides=overrides)
    run(tmp_path / "whole")
    die_and_go_on(run, tmp_path, points, die_at, contents)


def die_and_go_on(
    run: Callable[..., object],
    tmp_path: Path,
    points: list[int],
    die_at: DieAt,
    contents: Contents,
) -> None:
    """The same for anything that takes an output and ``resume``; "whole" is what to expect."""
    out = tmp_path / "out"
    resume = False
    for point in points:
        if not die_at(partial(run, out, resume=resume), point):
            break
        assert not out.exists() or contents(out) == contents(tmp_path / "whole")
        resume = True
        if out.exists() and not workspace_path(out).exists():
            break  # it died after its work was done
    if workspace_path(out).exists() or not out.exists():
        run(out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    left = {path.name for path in tmp_path.iterdir()} - {"coded"}
    assert left - {".out.finished"} == {"out", "whole"}


@pytest.mark.slow
@pytest.mark.parametrize("point", [*range(1, 150, 12), *range(150, 200)])
def test_a_killed_decompression_goes_on(
    tiny_llama_sharded: Path, tmp_path: Path, point: int, die_at: DieAt, contents: Contents
) -> None:
    pipeline.run("lossless.yaml", tiny_llama_sharded, tmp_path / "coded")
    run = partial(pipeline.decompress, tmp_path / "coded")
    run(tmp_path / "whole")
    die_and_go_on(run, tmp_path, [point], die_at, contents)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(200, 290))
def test_killed_near_the_end(
    tiny_llama_sharded: Path, tmp_path: Path, point: int, die_at: DieAt, contents: Contents
) -> None:
    kill_and_resume(tiny_llama_sharded, tmp_path, ONE_STAGE, [point], die_at, contents)


def test_another_run_does_not_take_over_what_was_published(
    tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path, die_at: DieAt
) -> None:
    out = tmp_path / "out"
    run = partial(pipeline.run, "lossless.yaml", tiny_llama, out)
    point = 400
    while not (out.exists() and workspace_path(out).exists()):
        for path in (out, workspace_path(out), out.with_name(".out.finished")):
            shutil.rmtree(path, ignore_errors=True)
        point -= 1
        die_at(run, point)
    with pytest.raises(BadInput, match="another run"):
        pipeline.run("lossless.yaml", tiny_llama_tied, out, resume=True)
    assert pipeline.run("lossless.yaml", tiny_llama, out, resume=True).path == out


def test_a_run_that_finished_nothing_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="windows"):
        pipeline.run(
            "entropy_prune.yaml",
            tiny_llama,
            tmp_path / "out",
            overrides=["calibration.sequences=100000", "calibration.length=64"],
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("point", [3, *range(30, 330, 24)])
def test_killed_once(
    tiny_llama_sharded: Path, tmp_path: Path, point: int, die_at: DieAt, contents: Contents
) -> None:
    kill_and_resume(tiny_llama_sharded, tmp_path, ONE_STAGE, [point], die_at, contents)


@pytest.mark.parametrize("overrides", [ONE_STAGE, TWO_STAGES])
def test_killed_again_and_again(
    tiny_llama_sharded: Path,
    tmp_path: Path,
    overrides: list[str],
    die_at: DieAt,
    contents: Contents,
) -> None:
    points = [130, 160, 190, 220, 250]
    kill_and_resume(tiny_llama_sharded, tmp_path, overrides, points, die_at, contents)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [ONE_STAGE, TWO_STAGES])
@pytest.mark.parametrize("seed", range(40))
def test_killed_anywhere(
    tiny_llama_sharded: Path,
    tmp_path: Path,
    overrides: list[str],
    seed: int,
    die_at: DieAt,
    contents: Contents,
) -> None:
    chance = random.Random(seed)
    points = [chance.randrange(1, 400) for _ in range(chance.randrange(1, 5))]
    kill_and_resume(tiny_llama_sharded, tmp_path, overrides, points, die_at, contents)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("recipe", "seconds"), [("lossless.yaml", 0.1), ("entropy_prune.yaml", 6)])
def test_kill_9_of_the_command(
    tiny_llama_sharded: Path,
    tmp_path: Path,
    recipe: str,
    seconds: float,
    seed: int,
    contents: Contents,
) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "compress", str(tiny_llama_sharded)]
    command += ["--recipe", recipe, "--set", "calibration.length=64", "--output-dir"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    out = tmp_path / "out"
    with subprocess.Popen([*command, str(out)], cwd=ROOT) as process:
        while not workspace_path(out).exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.Random(seed).random() * seconds)
        process.send_signal(signal.SIGKILL)
    if workspace_path(out).exists():
        subprocess.run([*command, str(out), "--resume"], cwd=ROOT, check=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_an_unfinished_run_must_be_continued_or_started_again(
    tiny_llama: Path, tmp_path: Path, die_at: DieAt
) -> None:
    out = tmp_path / "out"
    run = partial(pipeline.run, "lossless.yaml", tiny_llama, out)
    for point in range(20, 400, 10):  # until it dies at work, not before
        assert die_at(run, point)
        if workspace_path(out).exists():
            break
    with pytest.raises(BadInput, match="unfinished run.*--resume.*--overwrite"):
        pipeline.run("lossless.yaml", tiny_llama, out)
    pipeline.run("lossless.yaml", tiny_llama, out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]


def test_a_resumed_run_of_another_recipe_reuses_nothing(
    tiny_llama: Path, tmp_path: Path, die_at: DieAt, contents: Contents
) -> None:
    pipeline.run("lossless.yaml", tiny_llama, tmp_path / "whole")
    out = tmp_path / "out"
    other = partial(pipeline.run, "lossless.yaml", tiny_llama, out, overrides=TWO_STAGES)
    assert die_at(other, 150)
    assert workspace_path(out).exists()
    pipeline.run("lossless.yaml", tiny_llama, out, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("point", range(40, 260, 17))
def test_an_overwrite_that_is_killed_keeps_the_old_output_or_has_the_new(
    tiny_llama: Path,
    tiny_llama_tied: Path,
    tmp_path: Path,
    point: int,
    die_at: DieAt,
    contents: Contents,
) -> None:
    out = tmp_path / "out"
    pipeline.run("lossless.yaml", tiny_llama_tied, out)
    pipeline.run("lossless.yaml", tiny_llama, tmp_path / "new")
    old, new = contents(out), contents(tmp_path / "new")
    died = die_at(lambda: pipeline.run("lossless.yaml", tiny_llama, out, overwrite=True), point)
    there = [contents(path) for path in (out, tmp_path / ".out.replaced") if path.exists()]
    assert old in there or new in there
    try:
        pipeline.run("lossless.yaml", tiny_llama, out, resume=died)
    except BadInput as error:  # it died before it had begun, or after it had ended
        assert "the output exists" in str(error)
        pipeline.run("lossless.yaml", tiny_llama, out, overwrite=True)
    assert contents(out) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def test_a_full_disk_is_one_clear_line_and_can_be_resumed(
    tiny_llama_sharded: Path, tmp_path: Path, contents: Contents
) -> None:
    """A limit on the size of files stands for a full disk: both fail the write."""
    import resource

    pipeline.run("lossless.yaml", tiny_llama_sharded, tmp_path / "whole")
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(Missing, match="no room on disk"):
            pipeline.run("lossless.yaml", tiny_llama_sharded, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists()
    assert not list(workspace_path(out).rglob("*.part"))
    pipeline.run("lossless.yaml", tiny_llama_sharded, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
