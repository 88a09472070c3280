"""transformers integration: importing this package, or torch, teaches it the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress._autoload import install
from compress.hf import packed
from compress.hf.quantized import COMPRESSED_TENSORS, count_weights

if TYPE_CHECKING:
    from compress.hf.config import EntropressConfig
    from compress.hf.skipping import skip_if_possible, skip_sublayers, skipped_parts

__all__ = [
    "COMPRESSED_TENSORS",
    "EntropressConfig",
    "count_weights",
    "packed",
    "skip_if_possible",
    "skip_sublayers",
    "skipped_parts",
]

install()


def __getattr__(name: str) -> Any:
    """On first use, for they import torch and transformers."""
    if name not in __all__:
        raise AttributeError(f"module 'compress.hf' has no attribute '{name}'")
    from compress.hf import config, skipping

    return getattr(config if name == "EntropressConfig" else skipping, name)
