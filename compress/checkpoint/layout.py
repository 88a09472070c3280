"""Which files of a model directory are what: shards, index, sidecars."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from compress.checkpoint.json_io import load_object
from compress.errors import BadInput, Corrupt

CONFIG = "config.json"
MANIFEST = "entropress.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
REPORT = "report.html"
REPORT_FOLDER = "report"
DF11 = "dfloat11_config"  # the config's key for weights coded by DFloat11
TOKENS = "entropress_tokens"  # the config's key for which tokens a prompt may lose

_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_WEIGHTS = (
    *_PICKLES,
    *(".safetensors", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".ot"),
    *(".npz", ".tflite", ".mlmodel"),
)
_OTHER_FOLDERS = re.compile(r"onnx|openvino|original|runs|checkpoint-\d+")
_BOOKKEEPING = {".git", ".gitattributes", ".gitignore", ".cache"}  # left by git and hub downloads


def find_shards(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The shards' file names in order and, where there is an index, the file of each tensor.

    Looks where transformers looks: one ``model.safetensors``, else an index, else a single file or
    a complete set ``*-00001-of-0000N.safetensors``; of a DFloat11 model, all ``*.safetensors``, as
    its loader does. Raises `BadInput` for a directory that holds no such model, `Corrupt` for a set
    with a file missing or an index that cannot be.
    """
    if not directory.is_dir():
        wrong = "not a directory" if directory.exists() else "no such directory"
        raise BadInput(wrong, where=directory, mend="pass the directory that holds config.json")
    every = sorted(path.name for path in directory.glob("*.safetensors") if path.is_file())
    weight_map = None
    if every and (directory / CONFIG).is_file() and DF11 in load_object(directory / CONFIG):
        files = every
    elif SINGLE in every:
        files = [SINGLE]
    elif (directory / INDEX).is_file():
        weight_map = _read_index(directory / INDEX)
        files = sorted(set(weight_map.values()))
    else:
        files = _unindexed(directory, every)
    if not (directory / CONFIG).is_file():
        raise BadInput(f"no {CONFIG}", where=directory, mend="pass a complete model directory")
    for file in (CONFIG, *files):
        if not (directory / file).is_file():
            raise Corrupt("the shard is missing", where=directory / file)
        if not _stays_inside(directory, directory / file):
            raise BadInput(
                "is a link that leaves the directory",
                where=directory / file,
                mend="pass the directory it points to, or copy the file",
            )
    return files, weight_map


def regular_files(directory: Path) -> Iterator[tuple[str, bool]]:
    """Every file below a directory, sorted within each folder, except what git and the hub leave.

    Gives the path relative to the directory, with ``/``, and whether it is a regular file whose
    content belongs to it: not a link that leaves, a broken link, a pipe or the like.
    """
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(set(folders) - _BOOKKEEPING)
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted(set(files) - _BOOKKEEPING) + links:
            path = Path(folder) / name
            yield (
                path.relative_to(directory).as_posix(),
                path.is_file() and _stays_inside(directory, path),
            )


def is_document(path: str) -> bool:
    """Whether a relative path is for people: the model card or part of a report.

    Nothing loads such a file and everybody edits it, so no manifest vouches for it.
    """
    return path in (CARD, REPORT) or path.startswith(f"{REPORT_FOLDER}/")


def find_sidecars(directory: Path) -> list[str]:
    """Files a model needs beside its weights: tokenizer, templates, code, cards, licence.

    Left out: config, manifest, shards and indices, weights in any format, hidden files, links that
    leave the directory, reports of an earlier run, and folders of exports or training runs.
    """
    return [
        path
        for path, regular in regular_files(directory)
        if regular
        and path not in (CONFIG, MANIFEST)
        and (path == CARD or not is_document(path))
        and not _is_left_out(path)
    ]


def _is_left_out(path: str) -> bool:
    *folders, name = path.split("/")
    return (
        any(part.startswith(".") for part in (*folders, name))
        or any(_OTHER_FOLDERS.fullmatch(folder) for folder in folders)
        or name.lower().endswith(_OTHER_WEIGHTS)
        or name.endswith((".index.json", ".done.json", ".part"))
    )


def _read_index(path: Path) -> dict[str, str]:
    """The checked ``weight_map`` of an index."""
    weight_map = load_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Corrupt("weight_map is missing or empty", where=path)
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"[^./\\\0][^/\\\0]*\.safetensors", file):
            raise Corrupt(
                "weight_map must name plain *.safetensors files",
                where=path,
                got=repr(file)[:200],
            )
    return weight_map


def _unindexed(directory: Path, files: list[str]) -> list[str]:
    """The shards of a directory without index among its ``files``, all ``*.safetensors``."""
    parts = [match for file in files if (match := _PART.fullmatch(file))]
    if parts:
        stem, count = parts[0]["stem"], int(parts[0]["parts"])
        whole = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if set(files) <= set(whole):
            return whole  # `find_shards` says which of them is missing
    if len(files) == 1:
        return files
    if files:
        raise BadInput(
            f"several safetensors files and no {INDEX}",
            where=directory,
            mend="load the model with transformers and save it again with save_pretrained",
        )
    pickles = sorted(p.name for p in directory.iterdir() if p.name.endswith(_PICKLES))
    if pickles:
        raise BadInput(
            f"only pickle weights ({pickles[0]}), which can run any code when opened",
            where=directory,
            mend="convert them where you trust them: load with transformers, then "
            "save_pretrained(directory, safe_serialization=True)",
        )
    raise BadInput("no *.safetensors files", where=directory, mend="pass a model directory")


def _stays_inside(directory: Path, path: Path) -> bool:
    """Whether a path's content lies in the directory or in the blobs of a hub cache snapshot."""
    root, target = directory.resolve(), path.resolve()
    return target.is_relative_to(root) or target.parent == root.parent.parent / "blobs"
