"""Training that is kept on disk: weights, moments and losses in one safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import NewTensor, write_shard
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    import torch

_KEY = "distillation"
_HISTORY = "history"
_DIGEST = "sha256"


def write_training(
    path: Path, identity: str, state: Mapping[str, torch.Tensor], history: Sequence[float]
) -> None:
    """Replace the file atomically; ``state`` is float32, ``history`` each step's loss.

    One tensor at a time is copied from the device. The last one is the SHA-256 of the others.
    """
    import torch

    digest = hashlib.sha256()

    def content(value: torch.Tensor) -> Iterator[memoryview]:
        data = _bytes(value)
        digest.update(data)
        yield data

    def end() -> Iterator[bytes]:
        yield digest.digest()

    losses = torch.tensor(history, dtype=torch.float64)
    tensors = [
        NewTensor(name, "F32", tuple(value.shape), content(value)) for name, value in state.items()
    ]
    tensors.append(NewTensor(_HISTORY, "F64", tuple(losses.shape), content(losses)))
    write_shard(path, [*tensors, NewTensor(_DIGEST, "U8", (32,), end())], {_KEY: identity})


def read_training(path: Path, identity: str, state: Mapping[str, torch.Tensor]) -> list[float]:
    """Fill ``state`` from the file, if there is one, and return the history.

    Raises `BadInput` where it is of another training, `Corrupt` where it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return []
    digest = hashlib.sha256()
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_KEY)
            if found is not None and found != identity:
                raise BadInput(
                    "the journal is that of another distillation",
                    where=path,
                    mend="remove it, or distil the same model with the same text and settings",
                )
            for name, value in state.items():
                stored = file.get_tensor(name)
                digest.update(_bytes(stored))
                value.copy_(stored)
            history = file.get_tensor(_HISTORY)
            digest.update(_bytes(history))
            if bytes(_bytes(file.get_tensor(_DIGEST))) != digest.digest():
                raise ValueError("another digest")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise Corrupt(
            "not the whole journal of a distillation",
            where=path,
            got=error,
            mend="remove it to train anew, or start again with --overwrite",
        ) from None
    losses: list[float] = history.tolist()
    return losses


def _bytes(value: torch.Tensor) -> memoryview:
    import torch

    return value.detach().cpu().flatten().view(torch.uint8).numpy().data
