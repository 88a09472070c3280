"""Files and directories that appear complete and on disk, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from compress.errors import BadInput, Missing

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def room_needed(path: Path) -> Iterator[None]:
    """Turn a full disk, a spent quota or a file-size limit into `Missing` (exit code 3)."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise Missing(
            f"no room on disk ({error.strerror})",
            where=path,
            mend="free some space or raise the limit, then run again",
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that gets its name only when whole and on disk.

    Until then it is called ``<name>.part``; an exception removes it. Raises `Missing` when there
    is no room.
    """
    part = path.with_name(path.name + ".part")
    with room_needed(path):
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            fsync_dir(path.parent)
        finally:
            part.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file; at any moment ``path`` holds the old content or the new."""
    with atomic_file(path) as file:
        file.write(data)


def copy_atomic(source: Path, path: Path) -> None:
    """Copy a file's content, following links, as `write_atomic` would write it."""
    with source.open("rb") as original, atomic_file(path) as file:
        shutil.copyfileobj(original, file, 1 << 20)


def fsync_dir(directory: Path) -> None:
    """Make the names in a directory as durable as the files they name."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_dir(finished: Path, final: Path, *, overwrite: bool = False) -> None:
    """Publish a finished directory under its final name by renaming it.

    With ``overwrite`` an existing directory is moved aside first and removed after. A kill at any
    point loses neither: `recover_dir`, called at the start of the next run, tidies up. Both paths
    must be on one file system. Raises `BadInput` when ``final`` exists and may not be replaced.
    """
    recover_dir(final)
    if final.exists() or final.is_symlink():
        if not overwrite:
            raise BadInput("exists already", where=final, mend="choose another or overwrite it")
        final.rename(_aside(final))
    finished.rename(final)
    fsync_dir(final.parent)
    recover_dir(final)


def recover_dir(final: Path) -> None:
    """Finish or undo a `replace_dir` that was killed: put the old directory back, or remove it."""
    aside, discarded = _aside(final), final.with_name(f".{final.name}.discarded")
    if aside.exists() or aside.is_symlink():
        # Removal is not atomic: rename first, so that half of a directory is never put back.
        aside.rename(discarded if final.exists() else final)
    _remove(discarded)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
