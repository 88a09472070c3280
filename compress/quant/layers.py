"""Which weights of a model are those of linear layers, and what keeps the others as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compress.checkpoint import FLOATS, TensorInfo
from compress.prune import model_config

if TYPE_CHECKING:
    import torch

_ROUTER = re.compile(r"Router|Gating|Gate(?![a-z])")  # classes, as compressed-tensors knows them
_ROUTER_NAMES = ("gate", "router", "shared_expert_gate")
_ROUTES = "routes tokens to experts"
_FUSED = "experts are one tensor"
ELSEWHERE = "not stored under its own name"
MERGED = "experts are merged into one tensor as they are loaded"


class Headers(Protocol):
    """Of a checkpoint: config and tensors, none of which is read."""

    @property
    def config(self) -> dict[str, Any]: ...

    def tensor_infos(self) -> dict[str, TensorInfo]: ...


@dataclass(frozen=True)
class Linears:
    """``weights``: names of the tensors that can be quantized, in the model's order; ``skipped``:
    by name what keeps the weight of another layer that multiplies by a matrix from it."""

    weights: list[str]
    skipped: dict[str, str]


def linear_names(checkpoint: Headers) -> Linears:
    """The weights of all `torch.nn.Linear` of the model, which is built without memory.

    Embeddings, norms and convolutions are neither. Raises `BadInput` for a model type that
    transformers does not know.
    """
    model = _empty_model(checkpoint.config)
    infos = checkpoint.tensor_infos()
    ties = model.all_tied_weights_keys
    tied = {*ties, *ties.values()}
    found = Linears([], {})
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            reason = _reason(module, path, own, parameter)
            if reason is None:
                continue
            if name in tied:
                reason = "tied to the embeddings"
            elif reason == _FUSED and name not in infos:
                reason = MERGED
            reason = reason or _stored_otherwise(name, parameter, infos)
            if reason:
                found.skipped[name] = reason
            else:
                found.weights.append(name)
    return found


def _reason(module: torch.nn.Module, path: str, own: str, parameter: torch.Tensor) -> str | None:
    """Why a parameter is not to be quantized, "" if it may be, None if it is of no interest."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kind = type(module).__name__
    if isinstance(module, nn.Linear | Conv1D):
        if own != "weight":
            return None
        if isinstance(module, Conv1D):
            return "a Conv1D, whose weight is transposed"
        if type(module) is not nn.Linear:
            return f"a {kind}, which may use its weight in ways of its own"
        return _ROUTES if path.split(".")[-1] in _ROUTER_NAMES else ""
    if parameter.ndim == 2 and _ROUTER.search(kind):
        return _ROUTES
    if parameter.ndim == 3 and "Experts" in kind:
        return _FUSED
    return None


def _stored_otherwise(name: str, parameter: torch.Tensor, infos: Mapping[str, TensorInfo]) -> str:
    if name not in infos:
        return ELSEWHERE
    info = infos[name]
    if info.dtype not in FLOATS or info.dtype == "F64":
        return f"stored as {info.dtype}"
    return "" if info.shape == tuple(parameter.shape) else "stored in another shape"


def _empty_model(config: Mapping[str, Any]) -> Any:
    """The model that ``config["architectures"]`` names, else the base model, on the meta device."""
    import torch
    import transformers

    names = config.get("architectures")
    listed = names if isinstance(names, list) else []
    named = getattr(transformers, str(listed[0]), None) if listed else None
    build = getattr(named, "_from_config", transformers.AutoModel.from_config)
    with torch.device("meta"):
        return build(model_config(config))
