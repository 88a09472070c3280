"""transformers integration: importing this package, or torch, teaches it the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress._autoload import install

if TYPE_CHECKING:
    from compress.hf.skipping import skip_if_possible, skip_sublayers

__all__ = ["skip_if_possible", "skip_sublayers"]

install()


def __getattr__(name: str) -> Any:
    """On first use, for they import torch and transformers."""
    if name not in __all__:
        raise AttributeError(f"module 'compress.hf' has no attribute '{name}'")
    from compress.hf import skipping

    return getattr(skipping, name)
