"""What a model is, wherever its files lie and whenever they were written."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from compress.checkpoint import CONFIG, Checkpoint, is_document, write_atomic
from compress.paths import cache_dir
from compress.progress import SILENT, Progress


def model_identity(checkpoint: Checkpoint, progress: Progress = SILENT) -> str:
    """SHA-256 over the names and contents of config, shards and sidecars, in hex.

    Manifest, model card and report are left out: what is said of a model does not change it. Kept
    in the cache until a file changes, so that a model is read but once; what no user can set, such
    as inodes and times of change, counts, so that no other model is taken for it.
    """
    paths = [checkpoint.path / file for file in (CONFIG, *checkpoint.files, *checkpoint.sidecars())]
    changed = [(stat.st_dev, stat.st_ino, stat.st_ctime_ns) for stat in map(Path.stat, paths)]
    place = f"{checkpoint.path.resolve()}\0{checkpoint.fingerprint}\0{changed}"
    memo = cache_dir() / "identities" / hashlib.sha256(place.encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[0-9a-f]{64}", known := memo.read_text()):
            return known
    sidecars = (path for path in checkpoint.sidecars() if not is_document(path))
    files = sorted({CONFIG, *checkpoint.files, *sidecars})
    sizes = {file: (checkpoint.path / file).stat().st_size for file in files}
    identity = hashlib.sha256()
    with progress.step("hashing the model", sum(sizes.values())) as step:
        for file, size in sizes.items():
            with (checkpoint.path / file).open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            identity.update(f"{file}\0{digest}\n".encode())
            step.advance(size)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memo, identity.hexdigest().encode())
    return identity.hexdigest()
