"""CrossQuant (arXiv 2410.07505): how much rounding activations takes away, and could take less.

A step for every element, ``t_i^alpha c_j^(1-alpha) / (2^(bits-1) - 1)``, t_i being the largest of
its token and c_j of its column. The quantization kernel is what is not 0 and becomes 0; the paper
finds that it, more than the outliers, decides what a model loses. Diagnostics only: no integer
product can compute with columns of different steps. What can is `plan_fold`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.quant.activations import BITS, fake_quant_tokens
from compress.quant.moments import over_inputs

if TYPE_CHECKING:
    import torch

ALPHA = 0.15


@dataclass(frozen=True)
class Kernel:
    """Of ``nonzero`` elements how many rounding makes 0: by token, and by token and column."""

    nonzero: int
    token: int
    cross: int

    @property
    def token_share(self) -> float:
        return self.token / max(1, self.nonzero)

    @property
    def cross_share(self) -> float:
        return self.cross / max(1, self.nonzero)

    def __add__(self, other: Kernel) -> Kernel:
        return Kernel(
            self.nonzero + other.nonzero, self.token + other.token, self.cross + other.cross
        )


def fake_quant_cross(x: torch.Tensor, bits: int = BITS, alpha: float = ALPHA) -> torch.Tensor:
    """``x`` [tokens, columns] rounded in steps that go with its token and its column.

    ``alpha`` 1 leaves only the token's, 0 only the column's. Computed in float32, given in the
    dtype of ``x``. Raises `BadInput` for an ``alpha`` that is not between 0 and 1.
    """
    import torch

    if not 0 <= alpha <= 1:
        raise BadInput("must be between 0 and 1", where="alpha", got=alpha)
    wide = x.detach().float()
    size = wide.abs()
    token, column = size.amax(1, keepdim=True), size.amax(0, keepdim=True)
    step = token**alpha * column ** (1 - alpha) / ((1 << bits - 1) - 1)
    # No element is larger than the two maxima, so none needs a code out of range.
    return torch.where(step > 0, (wide / step).round() * step, 0.0).to(x.dtype)


def kernel_fractions(
    model: Any,
    tokens: torch.Tensor,
    *,
    layers: Collection[str] | None = None,
    bits: int = BITS,
    alpha: float = ALPHA,
    progress: Progress = SILENT,
) -> dict[str, Kernel]:
    """By name of their weights the kernels of the inputs of a model's linear layers.

    The maxima of columns are those of each sequence. See `over_inputs` for ``tokens``, ``layers``
    and what is raised.
    """

    def kernel(name: str, x: torch.Tensor) -> Kernel:
        there = x != 0
        token = there & (fake_quant_tokens(x, bits) == 0)
        cross = there & (fake_quant_cross(x, bits, alpha) == 0)
        return Kernel(int(there.sum()), int(token.sum()), int(cross.sum()))

    return over_inputs(model, tokens, kernel, layers=layers, progress=progress)
