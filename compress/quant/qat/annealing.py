"""Weights that cannot decide between two codes, and how they are calmed.

Confidence-guided annealing (CGA) of OFQ, arXiv 2302.02210: at the end of training only weights
within a range of a rounding boundary, which may yet change their codes, have gradients; all others
rest. The range is in steps here. Imports torch.
"""

from __future__ import annotations

from typing import Any

import torch


def near_boundary(ratio: torch.Tensor, limit: int, within: float) -> torch.Tensor:
    """bool of the shape of ``ratio``, weights in steps: whether their rounding is that uncertain.

    Boundaries lie half-way between two codes of -limit to limit.
    """
    return ((ratio - ratio.floor() - 0.5).abs() <= within) & (ratio.abs() < limit)


def masked(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``value``, with a gradient only where ``mask``."""
    masked_value: torch.Tensor = _Masked.apply(value, mask)
    return masked_value


class OscillationMeter:
    """Counts how often each weight's code changes; ``codes``: int8, those to begin with."""

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes.clone()
        self.flips = torch.zeros_like(codes, dtype=torch.int16)

    def update(self, codes: torch.Tensor, count: bool = True) -> None:
        """The codes as they are now; whether a change of them is to be counted."""
        if count:
            self.flips += codes != self.codes
        self.codes.copy_(codes)

    @property
    def share(self) -> float:
        """The share of weights whose codes changed more than once."""
        return float((self.flips > 1).double().mean())


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, None
