"""What compressed-tensors stores of quantized weights: how many there are, and what is overhead."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from compress import codec
from compress.checkpoint import TensorInfo, dense_config

if TYPE_CHECKING:
    import torch

COMPRESSED_TENSORS = "compressed-tensors"

_WEIGHT, _PACKED, _SHAPE = "weight", "weight_packed", "weight_shape"


class Readable(Protocol):
    """A checkpoint: its config, its tensors, and one of them."""

    @property
    def config(self) -> dict[str, Any]: ...

    def tensor_infos(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str) -> torch.Tensor: ...


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``quantization_config`` of a model before it was coded, None if it was not quantized."""
    stated = dense_config(dict(config)).get("quantization_config")
    return stated if isinstance(stated, dict) else None


def count_weights(checkpoint: Readable) -> dict[str, int]:
    """By tensor name how many weights it holds, of a checkpoint coded or not, quantized or not.

    Codes count as the weights they stand for, however they are packed; scales, zero points, shapes
    count as none, so that bits per weight are those of all that is stored for a weight.
    """
    infos = checkpoint.tensor_infos()
    counts = {name: _elements(info) for name, info in infos.items()}
    stated = quantization_of(checkpoint.config) or {}
    if stated.get("quant_method") != COMPRESSED_TENSORS:
        return counts
    for name in infos:
        layer, _, own = name.rpartition(".")
        if own == _PACKED and f"{layer}.{_SHAPE}" in infos:
            counts[name] = prod(checkpoint.read(f"{layer}.{_SHAPE}").tolist())
        elif (
            own.startswith(f"{_WEIGHT}_")
            and {f"{layer}.{_WEIGHT}", f"{layer}.{_PACKED}"} & infos.keys()
        ):
            counts[name] = 0
    return counts


def _elements(info: TensorInfo) -> int:
    return info.nbytes * 8 // codec.dtype_bits(info.dtype)
