"""Models on disk: open, stream tensors, rewrite, publish, seal with a manifest."""

from __future__ import annotations

from compress.checkpoint.atomic import (
    atomic_file,
    copy_atomic,
    fsync_dir,
    recover_dir,
    replace_dir,
    room_needed,
    write_atomic,
)
from compress.checkpoint.checkpoint import Checkpoint, TensorInfo, open
from compress.checkpoint.consistency import QUANT_METHOD, dense_config, names_sha256
from compress.checkpoint.json_io import dump_json, load_json, load_object
from compress.checkpoint.layout import (
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    REPORT,
    REPORT_FOLDER,
    SINGLE,
    TOKENS,
    is_document,
)
from compress.checkpoint.loading import FLOATS
from compress.checkpoint.manifest import check_files, hash_files, read_manifest, write_manifest
from compress.checkpoint.rewrite import rewrite
from compress.checkpoint.safetensors_writer import Digest, NewTensor, write_shard
from compress.checkpoint.source import Source, resolve

__all__ = [
    "CARD",
    "CONFIG",
    "FLOATS",
    "INDEX",
    "MANIFEST",
    "QUANT_METHOD",
    "REPORT",
    "REPORT_FOLDER",
    "SINGLE",
    "TOKENS",
    "Checkpoint",
    "Digest",
    "NewTensor",
    "Source",
    "TensorInfo",
    "atomic_file",
    "check_files",
    "copy_atomic",
    "dense_config",
    "dump_json",
    "fsync_dir",
    "hash_files",
    "is_document",
    "load_json",
    "load_object",
    "names_sha256",
    "open",
    "read_manifest",
    "recover_dir",
    "replace_dir",
    "resolve",
    "rewrite",
    "room_needed",
    "write_atomic",
    "write_manifest",
    "write_shard",
]
