"""A packed model as the coded tensors of docs/FORMAT.md, under the names of its checkpoint.

Stored bytes are written as they are; all else is coded. Weights that transformers merged or cut
when it loaded them are decoded for that, one layer at a time, and put back as they were.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers.core_model_loading import (
    WeightConverter,
    apply_converters,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from compress import codec
from compress.checkpoint import FLOATS, names_sha256
from compress.hf.packed.modules import Packed

_DTYPES = {getattr(torch, name): kind for kind, name in FLOATS.items()} | {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def coded_state_dict(
    model: Any, conversions: list[Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Coded tensors (1-D uint8, CPU) by name in order, and what config.json says of them.

    ``model``: packed; ``conversions``: what transformers did to the checkpoint's tensors. Of tied
    weights only those are there that `save_pretrained` would write. Memory: the coded tensors that
    the model does not hold itself, and one layer decoded.
    """
    state = _untied(model)
    found: dict[str, torch.Tensor] = {}
    dtypes: dict[str, str] = {}
    for names in _by_layer(state, conversions):
        part = {
            name: _dense(state[name]) if converted else state[name]
            for name, converted in names.items()
        }
        for name, tensor in _reverted(model, conversions, part).items():
            dtypes[name] = _DTYPES[tensor.dtype]
            found[name] = _coded(name, tensor)
    ordered = sorted(found)
    floats = (FLOATS[dtypes[name]] for name in ordered if dtypes[name] in FLOATS)
    members = {
        "format_version": codec.FORMAT_VERSION,
        "min_reader": codec.MIN_READER,
        "tensors": len(found),
        "names_sha256": names_sha256(found),
        "dtype": next(floats, None),
    }
    return {name: found[name] for name in ordered}, members


class _Packed(torch.Tensor):
    """Stands for a packed weight, with its dtype, while names are sorted out."""

    weight: tuple[Packed, str]


def _untied(model: Any) -> dict[str, torch.Tensor]:
    """The state dict by the names of the dense model; each tied weight once, unsaved ones never."""
    names: dict[str, str] = {}
    stand_ins: dict[tuple[int, int], _Packed] = {}
    state = dict(model.state_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Packed):
            continue
        for leaf, packing in module.packings.items():
            place = id(module.get_buffer(packing.buffer)), packing.first_row
            if place not in stand_ins:
                stand_ins[place] = torch.empty(1, dtype=packing.dtype).as_subclass(_Packed)
                stand_ins[place].weight = module, leaf
            key = f"{path}.{packing.buffer}"
            names[key], state[key] = f"{path}.{leaf}", stand_ins[place]
    state = {names.get(key, key): value for key, value in state.items()}
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    return remove_tied_weights_from_state_dict(state, model)


def _by_layer(state: Mapping[str, Any], conversions: list[Any]) -> list[dict[str, bool]]:
    """The names of each layer, and which of them are converted beyond their names.

    What is converted into one tensor, or from one, is in one layer by the name it gets.
    """
    reverse = [conversion.reverse_transform() for conversion in conversions[::-1]]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    layers: dict[str, dict[str, bool]] = defaultdict(dict)
    for name in state:
        renamed, pattern = apply_converters(name, converters)
        layer = re.match(r"(.+?\.\d+)\.", renamed)
        layers[layer[1] if layer else ""][name] = pattern is not None
    return list(layers.values())


def _reverted(
    model: Any, conversions: list[Any], part: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What transformers makes of tensors of the model to save them as they were loaded."""
    held = model._weight_conversions
    model._weight_conversions = conversions
    try:
        return revert_weight_conversion(model, part)
    finally:
        model._weight_conversions = held


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """The values that a tensor of the state has or stands for."""
    if not isinstance(tensor, _Packed):
        return tensor
    module, leaf = tensor.weight
    return module.dense(leaf)


def _coded(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, _Packed):
        module, leaf = tensor.weight
        packing = module.packings[leaf]
        if packing.form == "stored":
            return _renamed(name, module.get_buffer(packing.buffer))
    dense = _dense(tensor).detach().cpu().contiguous()
    data = dense.reshape(-1).view(torch.uint8).numpy()
    coded = bytearray().join(codec.encode(name, _DTYPES[dense.dtype], dense.shape, [data]))
    return torch.frombuffer(coded, dtype=torch.uint8)


def _renamed(name: str, blob: torch.Tensor) -> torch.Tensor:
    """Coded bytes under a name; no copy where it is theirs."""
    header = codec.read_header(blob[: codec.HEADER_MAX].numpy().data)
    front = next(codec.encode(name, header.dtype, header.shape, ()))
    crc = codec.read_header(front).name_crc
    if crc == header.name_crc:
        return blob
    front = replace(header, name_crc=crc).pack()
    return torch.cat([torch.frombuffer(bytearray(front), dtype=torch.uint8), blob[len(front) :]])
