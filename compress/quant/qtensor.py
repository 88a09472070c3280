"""The one representation of a quantized weight matrix, and what all quantizers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from compress.errors import BadInput
from compress.quant.rate import Rate, measure_rate
from compress.signals import one_thread_each

if TYPE_CHECKING:
    import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_PART = 1 << 17  # weights at a time: float copies of that many stay in the cache


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is quantized.

    ``bits``: 2 to 8, the range of codes; ``group``: columns that share a scale, None for the whole
    row. Raises `BadInput` for other values.
    """

    bits: int
    group: int | None
    symmetric: bool

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise BadInput("codes of this width are not known", got=self.bits, expected="2 to 8")
        if self.group is not None and self.group < 1:
            raise BadInput("a group needs a column", where="group", got=self.group)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight matrix [rows, columns] as integers, in the layout of compressed-tensors.

    ``codes``: int8 [rows, columns], within -2^(bits-1) to 2^(bits-1)-1, the lowest only where
    asymmetric; ``scale``: float16, bfloat16 or float32 [rows, groups], positive and normal;
    ``zero``: int8 [rows, groups] of the codes' range, None where symmetric. ``widened``: rows whose
    step had to be wider than asked for, so that every weight has a code.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme
    widened: int = 0

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """``(codes - zero) * scale``, [rows, columns], bit for bit as compressed-tensors has it.

        A model loaded in ``dtype`` holds its scales in it, so they are rounded to it first and the
        arithmetic is that of ``dtype``.
        """
        scale = self.scale.to(dtype)[..., None]
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(dtype)
        if self.zero is not None:
            groups -= self.zero.to(dtype)[..., None]
        return groups.mul_(scale).flatten(1)

    def rate(self) -> Rate:
        """What it costs (`measure_rate`)."""
        return measure_rate(self)


def by_rows(w: torch.Tensor, work: Callable[[slice], None]) -> None:
    """Do ``work`` for all rows of a matrix, some 2^17 weights at a time (`side_by_side`)."""
    size = max(1, _PART // w.shape[1])
    side_by_side(work, [slice(first, first + size) for first in range(0, w.shape[0], size)])


def side_by_side(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """``work`` of each item in order, as many at once as torch has threads, on one thread each.

    Threads of torch's own would wait for each other after every operation, which takes forever on a
    busy machine. Within ``work`` this is a loop.
    """
    import torch

    threads = min(torch.get_num_threads(), len(items))
    with one_thread_each():
        if threads <= 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, items))


def check_matrix(w: torch.Tensor, name: str) -> None:
    """Raise `BadInput` for what is not a matrix of floats with at least one weight."""
    if w.ndim != 2 or not w.numel() or not w.is_floating_point():
        raise BadInput(
            "only matrices of floating-point weights can be quantized",
            where=name,
            got=f"{w.dtype} {list(w.shape)}".removeprefix("torch."),
        )


def check_finite(extremes: torch.Tensor, name: str, first_row: int) -> None:
    """Raise `BadInput` naming the row where the rows' ``extremes`` [rows, …] are not finite."""
    bad = ~extremes.isfinite().flatten(1).all(dim=1)
    if bool(bad.any()):
        row = first_row + int(bad.int().argmax())
        raise BadInput("holds NaN or infinity", where=f"{name}, row {row}", mend="repair the model")


def stored_scale(scale: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Scales as they are stored: in ``dtype``, never lower, and at least its least normal number.

    Rounding up keeps what divided by the exact scale is in range in range; subnormal scales would
    be 0 on some devices. ``scale``: float64, not negative. Raises `BadInput` for one too large, and
    for other dtypes than float16, bfloat16 and float32.
    """
    import torch

    words = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
    if dtype not in words:
        raise BadInput(
            "scales cannot be stored so", got=dtype, expected="float16, bfloat16, float32"
        )
    near = scale.clamp(min=torch.finfo(dtype).tiny).to(dtype)
    above = (near.view(words[dtype]) + 1).view(dtype)  # of positive floats the next one
    stored = torch.where(near.double() < scale, above, near)
    if not bool(stored.isfinite().all()):
        raise BadInput(
            "a scale is too large for its dtype",
            where=name,
            got=f"{float(scale.max()):.3g}",
            expected=f"at most {torch.finfo(dtype).max:.3g}",
            mend="store scales as bfloat16",
        )
    return stored
