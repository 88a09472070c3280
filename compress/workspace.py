"""Where a run works: a hidden directory beside its output, locked, resumable, removed at the end.

``.NAME.entropress`` holds ``run.json`` (what was permitted), and for each finished stage a
directory named by a digest of its input and options, with its report beside it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import (
    CONFIG,
    MANIFEST,
    dump_json,
    fsync_dir,
    load_object,
    recover_dir,
    replace_dir,
    room_needed,
    write_atomic,
)
from compress.errors import BadInput, Missing


def absolute(output: str | Path) -> Path:
    """An output's full path without ``..``; a link stays a link, since links are replaced."""
    path = Path(os.path.abspath(output))  # noqa: PTH100
    if not path.name:
        raise BadInput("the root cannot be an output directory", where=path)
    return path


def workspace_path(output: Path) -> Path:
    """The workspace of an output directory: deterministic, on the same file system."""
    return output.with_name(f".{output.name}.entropress")


def _finished_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.finished")


def _sweep_finished(output: Path) -> None:
    shutil.rmtree(_finished_path(output), ignore_errors=True)


def check_output(
    output: Path, source: Path | None = None, *, resume: bool, overwrite: bool
) -> None:
    """Refuse an output that would destroy something, before anything is written.

    Raises `BadInput` when it exists and ``overwrite`` is off, is not a checkpoint and would be
    overwritten, overlaps the input, or was left unfinished and neither flag is given.
    """
    if resume and overwrite:
        raise BadInput("--resume and --overwrite exclude each other")
    real, taken = output.resolve(), source.resolve() if source else None
    if taken and (real == taken or real in taken.parents or taken in real.parents):
        raise BadInput("output and input overlap", where=output, mend="choose another --output-dir")
    left = workspace_path(output).exists()
    if left and not (resume or overwrite):
        raise BadInput(
            "an unfinished run was left here",
            where=output,
            mend="continue it with --resume or start again with --overwrite",
        )
    if not occupied(output) or (resume and left):
        return
    if not overwrite:
        raise BadInput(
            "the output exists", where=output, mend="choose another --output-dir or --overwrite it"
        )
    if not ((output / MANIFEST).is_file() or (output / CONFIG).is_file()):
        raise BadInput("is not a checkpoint, so it is not overwritten", where=output)


def occupied(output: Path) -> bool:
    """Whether anything but an empty directory bears the name."""
    if output.is_dir() and not output.is_symlink():
        return any(output.iterdir())
    return output.exists() or output.is_symlink()


@dataclass(frozen=True)
class RunDirectory:
    """An open, locked workspace."""

    path: Path
    output: Path
    overwrite: bool

    def stage(self, key: str) -> Path:
        """The output directory of the stage with that key; made by whoever writes into it."""
        return self.path / key

    def scratch(self, key: str) -> Path:
        """A directory for what an unfinished stage has found out, kept until it is finished."""
        path = self.path / f"{key}.scratch"
        path.mkdir(exist_ok=True)
        return path

    def answers(self, key: str) -> Path:
        """Where the answers of an interrupted evaluation of that stage's output are kept."""
        return self.path / f"{key}.answers"

    def report(self, key: str) -> dict[str, Any]:
        """The report of a stage that is complete."""
        return load_object(self._report(key))

    def finished(self, key: str) -> bool:
        """Whether a stage is complete and its output still there."""
        return self._report(key).is_file() and self.stage(key).is_dir()

    def begin(self, key: str) -> None:
        """Forget an earlier report: until `finish`, the stage's output counts as incomplete."""
        self._report(key).unlink(missing_ok=True)
        fsync_dir(self.path)

    def finish(self, key: str, report: dict[str, Any]) -> None:
        """Record that a stage's output is complete."""
        write_atomic(self._report(key), dump_json(report))
        shutil.rmtree(self.scratch(key))

    def drop(self, key: str) -> None:
        """Free a stage's output that the next one has used up; its report stays."""
        shutil.rmtree(self.stage(key), ignore_errors=True)

    def sweep(self, key: str) -> None:
        """Remove files that a kill left half-written in a finished stage's output."""
        for part in self.stage(key).rglob("*.part"):
            part.unlink()

    def keep_only(self, keys: list[str]) -> None:
        """Remove what belongs to another model or recipe."""
        names = {"lock", "run.json"}
        for key in keys:
            names |= {key, f"{key}.json", f"{key}.scratch", self.answers(key).name}
        for path in self.path.iterdir():
            if path.name in names:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def publish(self, key: str, claims: Sequence[Any] = ()) -> None:
        """Give a finished stage directory the output's name; ``claims``: what was checked on it."""
        self._permit(published=key, claims=list(claims))
        if self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()
        replace_dir(self.stage(key), self.output, overwrite=self.overwrite)

    def published(self, key: str, claims: Sequence[Any] = ()) -> bool:
        """Whether an interrupted run with the same ``claims`` had given that stage its name.

        Raises `BadInput` when the output exists, is of another run, and may not be overwritten.
        """
        run = self._run()
        same = run.get("published") == key and run.get("claims") == list(claims)
        if same and not self.stage(key).exists():
            return self.output.is_dir()
        if occupied(self.output) and not self.overwrite:
            raise BadInput(
                "the output exists, and what was left unfinished here was another run",
                where=self.output,
                mend="choose another --output-dir or --overwrite it",
            )
        return False

    def worthless(self) -> bool:
        """Whether nothing is finished here that a resumed run could use."""
        return not any(
            path.name not in ("lock", "run.json") and path.suffix == ".json"
            for pattern in ("*.json", "*/*.done.json", "*.scratch/*")
            for path in self.path.glob(pattern)
        ) and not self._run().get("published")

    def remove(self) -> None:
        """End the run. The record of what was published goes last, and at once, by a rename."""
        self.keep_only([])
        self.path.rename(_finished_path(self.output))
        fsync_dir(self.path.parent)
        _sweep_finished(self.output)

    def _report(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _run(self) -> dict[str, Any]:
        path = self.path / "run.json"
        return load_object(path) if path.is_file() else {}

    def _permit(self, **facts: Any) -> None:
        write_atomic(self.path / "run.json", dump_json({**self._run(), **facts}))


@contextmanager
def open_workspace(output: Path, *, overwrite: bool) -> Iterator[RunDirectory]:
    """Make or take over the workspace of ``output``, for one process at a time.

    ``overwrite`` starts afresh. Otherwise what an interrupted run left is taken over, with the
    permission it had. An exception leaves what `--resume` can use, or nothing. Raises `BadInput`
    when another process is at work on the same output, `Missing` when the place cannot be written.
    """
    path = workspace_path(output)
    lock = _lock(path, output)
    try:
        recover_dir(output)
        _sweep_finished(output)
        run = RunDirectory(path, output, overwrite)
        if overwrite:
            run.keep_only([])
            run._permit(overwrite=True, published=None)
        else:
            run = RunDirectory(path, output, bool(run._run().get("overwrite")))
        try:
            with room_needed(output):
                yield run
        except Exception:
            if run.worthless():
                shutil.rmtree(path, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(path: Path, output: Path) -> int:
    """A file descriptor that holds the workspace's lock; closing it gives the lock up."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Missing(f"cannot be written: {error.strerror}", where=output.parent) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == (path / "lock").stat().st_ino:
                return lock
        except BlockingIOError:
            os.close(lock)
            raise BadInput("another run is writing here", where=output) from None
        except FileNotFoundError:
            pass
        os.close(lock)  # the run that held it removed the workspace just then


def stage_key(index: int, *inputs: Any) -> str:
    """The name of a stage's directory: its position and a digest of all that decides its output."""
    return f"{index:02}-{hashlib.sha256(dump_json(list(inputs))).hexdigest()[:24]}"


def check_room(directory: Path, needed: int, already: Path) -> None:
    """Raise `Missing` unless about ``needed`` bytes are free, less what ``already`` holds."""
    held = sum(path.stat().st_size for path in already.rglob("*") if path.is_file())
    free = shutil.disk_usage(directory).free
    if free + held < needed:
        raise Missing(
            "not enough room on disk",
            where=directory,
            got=f"{free / 1e9:.2f} GB free",
            expected=f"about {needed / 1e9:.2f} GB",
            mend="free some space or choose another --output-dir",
        )
