"""Where and how to train."""

from __future__ import annotations

from typing import Any

from compress.errors import BadInput, Missing


def make_accelerator(batch: int, where: str) -> Any:
    """An `accelerate.Accelerator` in float32, whatever a launcher was told.

    Raises `Missing` without accelerate, and `BadInput`, naming ``where``, for a ``batch`` that its
    processes cannot share.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise Missing("accelerate is not installed", mend="run: pip install accelerate") from None
    accelerator = Accelerator(mixed_precision="no")
    if batch % accelerator.num_processes:
        raise BadInput(
            "the processes cannot share a batch",
            where=where,
            got=batch,
            expected=f"a multiple of {accelerator.num_processes}",
        )
    return accelerator
