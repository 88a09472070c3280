"""Round to nearest: scales from the largest weight, 2 to 8 bits, by row or by group of columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.quant.qtensor import (
    QTensor,
    Scheme,
    by_rows,
    check_finite,
    check_matrix,
    stored_scale,
)

if TYPE_CHECKING:
    import torch

_GROUPS = (64, 32)
_LEAST_GROUP = 16  # of less, a scale costs more than a bit a weight


def quantize_rtn(
    w: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, *, name: str = "weight"
) -> QTensor:
    """A float matrix [rows, columns] rounded to the nearest code; ``name`` is for messages.

    Symmetric: ``scale = max|w| / (2^(bits-1) - 1)``. Asymmetric: ``scale = (max - min) / (2^bits -
    1)`` and ``zero = -2^(bits-1) - round(min / scale)``, zero being within the range as the zero
    point is to be a code. Stored scales are rounded up, so that no weight is clipped: in float32
    every weight is within half a step. A group without weights other than 0 has codes of 0.

    Raises `BadInput` where the groups do not divide the columns (see `fitting_group`), for weights
    that are not finite and for scales beyond ``scale_dtype``.
    """
    import torch

    check_matrix(w, name)
    w = w.detach()
    rows, columns = w.shape
    group = scheme.group or columns
    if columns % group:
        raise BadInput(
            f"groups of {group} do not divide {columns} columns",
            where=name,
            mend="choose the size by fitting_group",
        )
    codes = w.new_empty(rows, columns, dtype=torch.int8)
    scale = w.new_empty(rows, columns // group, dtype=scale_dtype)
    zero = None if scheme.symmetric else w.new_empty(scale.shape, dtype=torch.int8)
    lowest, highest = -(1 << scheme.bits - 1), (1 << scheme.bits - 1) - 1

    def work(part: slice) -> None:
        x = w[part].float().unflatten(1, (-1, group))
        low, high = x.amin(2).double(), x.amax(2).double()
        check_finite(high - low, name, part.start)
        if zero is None:
            scale[part] = stored_scale(torch.maximum(-low, high) / highest, scale_dtype, name)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale[part] = stored_scale((high - low) / (highest - lowest), scale_dtype, name)
            zero[part] = lowest - (low / scale[part].double()).round()
        x = (x / scale[part].float()[..., None]).round_()
        if zero is not None:
            x = (x + zero[part][..., None]).clamp_(lowest, highest)
        codes[part] = x.flatten(1)

    by_rows(w, work)
    return QTensor(codes, scale, zero, scheme)


def fitting_group(columns: int, wanted: int) -> int:
    """The largest size of groups, at most ``wanted``, that divides ``columns``.

    It is ``wanted``, 64, 32 or a divisor of one of them, of at least 16 unless ``wanted`` is less.
    Raises `BadInput` where none divides.
    """
    least = min(wanted, _LEAST_GROUP)
    for size in range(wanted, max(0, least - 1), -1):
        if columns % size == 0 and any(base % size == 0 for base in (wanted, *_GROUPS)):
            return size
    raise BadInput(
        f"no size of groups divides {columns} columns",
        where="group",
        got=wanted,
        expected=f"a divisor of {wanted}, 64 or 32 that does, {least} or more",
        mend="quantize by row",
    )
