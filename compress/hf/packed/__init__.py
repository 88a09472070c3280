"""Models whose weights stay compressed in memory (docs/PACKED.md).

`forms` makes and reads packed weights, `ops` computes with them, `modules` and `experts` turn
loaded modules into such that hold them. Beside the two layouts for GPUs a weight may be packed as
``stored``: the bytes of docs/FORMAT.md as they are, for the CPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compress.codec import packed

if TYPE_CHECKING:
    from compress.hf.packed.forms import check, dtype_of, form_for, form_of, pack, rows_of
    from compress.hf.packed.merged import merge
    from compress.hf.packed.modules import Packed, Packing, adopt

FORMS = ("stored", *packed.LAYOUTS)
EXACT = ("logits", "weights")  # what is bit for bit that of the dense model

_PLACES = {
    "forms": ("check", "dtype_of", "form_for", "form_of", "pack", "rows_of"),
    "merged": ("merge",),
    "modules": ("Packed", "Packing", "adopt"),
}

__all__ = [
    "EXACT",
    "FORMS",
    "Packed",
    "Packing",
    "adopt",
    "check",
    "dtype_of",
    "form_for",
    "form_of",
    "merge",
    "pack",
    "rows_of",
]


def __getattr__(name: str) -> Any:
    """On first use, for they import torch."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"compress.hf.packed.{module}"), name)
    raise AttributeError(f"module 'compress.hf.packed' has no attribute '{name}'")
