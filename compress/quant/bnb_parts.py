"""A weight as bitsandbytes stores it: its tensors, what they take and how they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Literal

from compress.checkpoint import FLOATS, TensorInfo
from compress.errors import BadInput
from compress.quant.export import layer_name
from compress.quant.rate import Rate

if TYPE_CHECKING:
    import torch

Kind = Literal["nf4", "int8"]
Layout = dict[str, tuple[str, tuple[int, ...] | None]]

_BLOCK, _NESTED_BLOCK = 64, 256
_ROWS = 32
_BITS = {"F32": 32, "U8": 8, "I8": 8}


def bnb_unfit(info: TensorInfo, kind: Kind) -> str | None:
    """Why a weight cannot be quantized, None if it can be.

    NF4 needs 32k rows and 64k columns: bitsandbytes 0.50 fails on others where the CPU has
    AVX512-BF16.
    """
    if not info.name.endswith(".weight") or len(info.shape) != 2:
        return "is not the weight of a linear layer"
    if info.dtype not in FLOATS or info.dtype == "F64":
        return f"cannot be quantized, stored as {info.dtype}"
    rows, columns = info.shape
    if kind == "nf4" and (rows % _ROWS or columns % _BLOCK):
        return f"is {rows} x {columns}, not multiples of {_ROWS} and {_BLOCK}"
    return None


def bnb_rate(
    names: Iterable[str], infos: Mapping[str, TensorInfo], kind: Kind, double_quant: bool = False
) -> Rate:
    """What the weights ``names`` take as stored, codes and scales, before any coding.

    The table of NF4's values counts as a scale; its state, 100 to 200 bytes, does not.
    """
    total = Rate()
    for name in names:
        codes, *scales = (
            _BITS[dtype] * prod(shape)
            for dtype, shape in bnb_layout(infos[name], kind, double_quant).values()
            if shape is not None
        )
        total += Rate(prod(infos[name].shape), codes, sum(scales))
    return total


def bnb_layout(info: TensorInfo, kind: Kind, double_quant: bool) -> Layout:
    """The tensors that a weight becomes, its codes first: by name the dtype and the shape.

    The shape of the state is None: its bytes, 100 to 200, depend on the values.
    """
    name, layer = info.name, layer_name(info.name)
    if kind == "int8":
        return {
            name: ("I8", info.shape),
            f"{layer}.SCB": ("F32", info.shape[:1]),
            f"{layer}.weight_format": ("U8", ()),
        }
    weights = prod(info.shape)
    blocks = weights // _BLOCK
    scales: Layout = {
        f"{name}.absmax": ("U8" if double_quant else "F32", (blocks,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.quant_state.bitsandbytes__nf4": ("U8", None),
    }
    if double_quant:
        scales[f"{name}.nested_absmax"] = ("F32", (-(-blocks // _NESTED_BLOCK),))
        scales[f"{name}.nested_quant_map"] = ("F32", (256,))
    return {name: ("U8", (weights // 2, 1)), **scales}


def quantize_bnb(
    weight: torch.Tensor, name: str, kind: Kind, double_quant: bool
) -> dict[str, torch.Tensor]:
    """The tensors of `bnb_layout` of a weight, 16- or 32-bit floats [rows, columns], on the CPU.

    Raises `BadInput` where one is not finite, for int8 in fp16.
    """
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if kind == "int8":
        weight = weight.to(torch.float16)  # as bitsandbytes does
    if not weight.isfinite().all():
        raise BadInput(f"holds values that are not finite in {weight.dtype}", where=name)
    if kind == "int8":
        codes, scales, _ = int8_vectorwise_quant(weight)
        layer, row_major = layer_name(name), torch.tensor(0, dtype=torch.uint8)
        return {name: codes, f"{layer}.SCB": scales, f"{layer}.weight_format": row_major}
    codes, state = quantize_4bit(
        weight, blocksize=_BLOCK, quant_type="nf4", compress_statistics=double_quant
    )
    stored = state.as_dict(packed=True)
    return {name: codes, **{f"{name}.{part}": tensor for part, tensor in stored.items()}}
