"""``entropress.json``: the last file written, canonical and self-checked (docs/FORMAT.md)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compress import codec
from compress.checkpoint.atomic import write_atomic
from compress.checkpoint.json_io import dump_json, load_object
from compress.checkpoint.layout import MANIFEST, is_document, regular_files
from compress.errors import BadInput, Corrupt
from compress.progress import SILENT, Progress

_MEMBERS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "min_reader": int,
    "class": str,
    "source": dict,
    "recipe": dict,
    "versions": dict,
    "stages": list,
    "tensors": dict,
    "files": dict,
    "gates": (list, dict),
}
_CLASSES = ("lossless", "near-lossless")


def write_manifest(directory: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Seal a finished directory; returns the document as written.

    ``format_version`` and ``min_reader`` are filled in, ``sha256`` is computed. Raises `ValueError`
    for a number that JSON has no form for, `Corrupt` for a document that readers would refuse.
    """
    versions = {"format_version": codec.FORMAT_VERSION, "min_reader": codec.MIN_READER}
    # Through text once: keys that are not text sort differently before and after.
    whole: dict[str, Any] = json.loads(json.dumps(versions | dict(document), allow_nan=False))
    whole.pop("sha256", None)
    whole["sha256"] = hashlib.sha256(dump_json(whole)).hexdigest()
    path = directory / MANIFEST
    _check_members(whole, path)
    write_atomic(path, dump_json(whole))
    return whole


def read_manifest(directory: Path) -> dict[str, Any]:
    """The checked manifest of a directory.

    Raises `Corrupt` when it is missing, not canonical to the byte, fails its own digest or lacks a
    member; `BadInput` when it needs a newer reader.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise Corrupt(
            f"no {MANIFEST}: unfinished, or not written by `entropress compress`", where=directory
        )
    document = load_object(path)
    try:
        canonical = dump_json(document) == path.read_bytes()
    except RecursionError:
        canonical = False
    if not canonical:
        raise Corrupt("not in canonical form", where=path)
    rest = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(dump_json(rest)).hexdigest()
    if document.get("sha256") != digest:
        raise Corrupt("fails its own sha256", where=path, expected=digest)
    needed = document.get("min_reader")
    if type(needed) is int and needed > codec.FORMAT_VERSION:
        raise newer_reader_needed(path, needed)
    _check_members(document, path)
    return document


def newer_reader_needed(path: Path, needed: int) -> BadInput:
    """The error for a checkpoint that only a later release can read."""
    return BadInput(
        f"needs a release of entropress that reads format {needed} or later",
        where=path,
        got=f"one that reads format {codec.FORMAT_VERSION}",
        mend="run: pip install --upgrade entropress",
    )


def hash_files(directory: Path, progress: Progress = SILENT) -> dict[str, dict[str, Any]]:
    """``bytes`` and ``sha256`` of every file below a directory, by relative path.

    Left out are the manifest, and the model card and report (`is_document`). Raises `Corrupt` for a
    link that leaves the directory or anything that is no regular file.
    """
    every = regular_files(directory)
    files = [item for item in every if item[0] != MANIFEST and not is_document(item[0])]
    for path, regular in files:
        if not regular:
            raise Corrupt("not a regular file of the directory", where=directory / path)
    sizes = {path: (directory / path).stat().st_size for path, _ in files}

    def sha256(path: str) -> str:
        with (directory / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    found = {}
    with (
        progress.step("hashing files", sum(sizes.values())) as step,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as hashers,
    ):
        for (path, size), digest in zip(sizes.items(), hashers.map(sha256, sizes), strict=True):
            found[path] = {"bytes": size, "sha256": digest}
            step.advance(size)
    return found


def check_files(
    directory: Path, manifest: Mapping[str, Any], progress: Progress = SILENT
) -> list[str]:
    """What differs between a directory and its manifest, one line a file; empty when nothing."""
    found = hash_files(directory, progress)
    listed = {path: entry for path, entry in manifest["files"].items() if not is_document(path)}
    faults = [f"{path}: missing" for path in listed.keys() - found.keys()]
    faults += [f"{path}: not in the manifest" for path in found.keys() - listed.keys()]
    for path in found.keys() & listed.keys():
        if found[path]["bytes"] != listed[path]["bytes"]:
            sizes = f"got {found[path]['bytes']} bytes, expected {listed[path]['bytes']}"
            faults.append(f"{path}: wrong size, {sizes}")
        elif found[path]["sha256"] != listed[path]["sha256"]:
            faults.append(f"{path}: wrong sha256")
    return sorted(faults)


def _check_members(document: Mapping[str, Any], path: Path) -> None:
    for member, kind in _MEMBERS.items():
        if not isinstance(document.get(member), kind) or isinstance(document[member], bool):
            raise Corrupt(f"member '{member}' is missing or of a wrong type", where=path)
    if document["class"] not in _CLASSES:
        raise Corrupt("unknown class", where=path, got=document["class"], expected=_CLASSES)
    for file, entry in document["files"].items():
        if not _is_plain(file):
            raise Corrupt("a path leaves the directory", where=path, got=repr(file)[:200])
        if not (_has_digest(entry) and _is_count(entry.get("bytes"))):
            raise Corrupt("a file needs bytes and sha256", where=path, got=repr(file)[:200])
    for name, entry in document["tensors"].items():
        if not (_has_digest(entry) and _describes_tensor(entry)):
            raise Corrupt(
                "a tensor needs dtype, shape and sha256", where=path, got=repr(name)[:200]
            )


def _describes_tensor(entry: Mapping[str, Any]) -> bool:
    return (
        isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and all(_is_count(length) for length in entry["shape"])
        and isinstance(entry.get("from", ""), str)
    )


def _has_digest(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256"))))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_plain(path: str) -> bool:
    """Relative, with ``/`` between components none of which is empty, ``.`` or ``..``."""
    return "\\" not in path and "\0" not in path and not {"", ".", ".."} & set(path.split("/"))
