"""A weight matrix that is trained as what its quantized form will be.

Rounding passes gradients on as if it were not there (straight-through), but for weights beyond the
range of codes: EdgeQAT (arXiv 2402.10787) equations 6 and 7. Imports torch.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.errors import BadInput
from compress.quant.qat.annealing import masked, near_boundary
from compress.quant.qtensor import QTensor, Scheme, check_matrix, stored_scale


class FakeWeight(torch.nn.Module):
    """``weight`` [rows, columns], float32, seen through symmetric codes; a step is a stored scale.

    As it is always rounded to the dtype that is stored, what training computes with is, bit for
    bit, `QTensor.dense` of `qtensor`. Raises `BadInput` for asymmetric schemes, for groups that do
    not divide the columns, and as `check_matrix`.
    """

    def __init__(self, w: torch.Tensor, scheme: Scheme, stored: torch.dtype, name: str) -> None:
        super().__init__()
        check_matrix(w, name)
        if not scheme.symmetric:
            raise BadInput("only symmetric codes can be trained", where=name)
        group = scheme.group or w.shape[1]
        if w.shape[1] % group:
            raise BadInput(f"groups of {group} do not divide {w.shape[1]} columns", where=name)
        self.weight = torch.nn.Parameter(w.detach().float().clone())
        self.limit = (1 << scheme.bits - 1) - 1
        self._shape = (w.shape[0], w.shape[1] // group, group)
        self._scheme, self._stored, self._name = scheme, stored, name

    def exact_step(self) -> torch.Tensor:
        """The step before it is rounded, float32, that broadcasts to [rows, groups, 1]."""
        raise NotImplementedError

    def step_share(self) -> float:
        """By what the step's gradient is multiplied."""
        return 1.0

    def forward(self, within: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the codes stand for, float32 [rows, columns], and the codes, int8, without gradient.

        ``within``: the range of annealing in which weights have a gradient; steps have none then.
        """
        values, codes = _Quantize.apply(*self._pair(within), self.limit, self.step_share())
        return values.flatten(1), codes.flatten(1)

    def ratio(self, within: float | None = None) -> torch.Tensor:
        """Weights in steps, float32 [rows, groups, columns of a group]: codes before rounding."""
        w, step = self._pair(within)
        return w / step

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """What is stored. Its scales are the steps of training, without rounding anything anew."""
        _, codes = self()
        step = self._rounded().expand(*self._shape[:2], 1)[..., 0]
        return QTensor(codes, step.to(self._stored).contiguous(), None, self._scheme)

    def _rounded(self) -> torch.Tensor:
        return _Stored.apply(self.exact_step(), self._stored, self._name)

    def _pair(self, within: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        w, step = self.weight.view(self._shape), self._rounded()
        if within is None:
            return w, step
        near = near_boundary((w / step).detach(), self.limit, within)
        return masked(w, near), masked(step, torch.zeros_like(step))


class _Stored(torch.autograd.Function):
    """Rounds to what can be stored."""

    @staticmethod
    def forward(ctx: Any, step: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        try:
            return stored_scale(step.double(), dtype, name).float()
        except BadInput:
            mend = "lower qat.step_rate, or store scales as bfloat16"
            raise BadInput(f"its step is beyond {dtype}", where=name, mend=mend) from None

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None, None


class _Quantize(torch.autograd.Function):
    """``clip(round(w / step)) * step``, with the gradients of LSQ (arXiv 1902.08153, eq. 3)."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, step: torch.Tensor, limit: int, share: float) -> Any:
        ratio = w / step
        codes = ratio.round().clamp_(-limit, limit).add_(0.0)  # integers know no -0
        ctx.save_for_backward(ratio, step)
        ctx.limit, ctx.share = limit, share
        small = codes.to(torch.int8)
        ctx.mark_non_differentiable(small)
        return codes * step, small

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient, (ratio, step) = gradients[0], ctx.saved_tensors
        inside = ratio.abs() <= ctx.limit
        codes = ratio.round().clamp_(-ctx.limit, ctx.limit)
        by_step = gradient * torch.where(inside, codes - ratio, codes)
        return gradient * inside, by_step.sum_to_size(step.shape) * ctx.share, None, None
