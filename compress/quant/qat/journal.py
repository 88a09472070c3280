"""Tensors of a training on disk, in one safetensors file that is replaced atomically."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import NewTensor, write_shard
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    import torch

_KEY = "qat"
_DIGEST = "sha256"
_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int16": "I16",
    "torch.int8": "I8",
}


def write_journal(path: Path, identity: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep ``tensors``, and their digest; ``identity`` says of what training they are."""
    import torch

    digest = hashlib.sha256()

    def content(value: torch.Tensor) -> Iterator[memoryview]:
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        digest.update(data)
        yield data

    def end() -> Iterator[bytes]:
        yield digest.digest()

    entries = [
        NewTensor(name, _DTYPES[str(value.dtype)], tuple(value.shape), content(value))
        for name, value in tensors.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, [*entries, NewTensor(_DIGEST, "U8", (32,), end())], {_KEY: identity})


def read_journal(path: Path, identity: str) -> dict[str, torch.Tensor] | None:
    """What was kept, on the CPU; None where there is no file.

    Raises `BadInput` where it is of another training, `Corrupt` where it is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    digest = hashlib.sha256()
    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_KEY)
            if found is not None and found != identity:
                raise BadInput(
                    "the journal is that of another training",
                    where=path,
                    mend="remove it, or train the same model with the same text and settings",
                )
            for name in file.offset_keys():
                tensors[name] = file.get_tensor(name)
            stored = bytes(tensors.pop(_DIGEST).numpy())
            for value in tensors.values():
                digest.update(value.flatten().view(torch.uint8).numpy().data)
            if stored != digest.digest():
                raise ValueError("another digest")
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
        raise Corrupt("not the whole journal of a training", where=path, got=error) from None
    return tensors
