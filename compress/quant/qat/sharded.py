"""Tensors of which each process holds a part, whole and back. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def gather(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole copies on the CPU; all processes call this alike."""
    from torch.distributed.tensor import DTensor

    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in state.items()
    }


def fill(state: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]) -> None:
    """Each process puts its part of ``kept`` into ``state``, whose names it has."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, value in state.items():
        whole = kept[name]
        if isinstance(value, DTensor):
            whole = distribute_tensor(
                whole.to(value.device), value.device_mesh, list(value.placements)
            )
        with torch.no_grad():
            value.copy_(whole)
