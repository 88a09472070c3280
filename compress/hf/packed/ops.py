"""What is computed with packed weights, as operators that `torch.compile` and autograd know.

``entropress::unpack``, ``entropress::linear`` and ``entropress::embedding``; see `forms` for what a
packed weight and its ints are. The weight is no parameter: gradients flow to the other factor and
to the bias, and the backward pass decodes again instead of keeping what was decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from compress.codec import packed as codec
from compress.hf.packed.forms import STORED, dtype_of, lent_rows, on_gpu, rows_of

_RUN = 1 << 20  # weights decoded at once for a lookup, as many as a stored segment holds


_LIBRARY = torch.library.Library("entropress", "FRAGMENT")  # what it holds lasts as long as it


def _operator(schema: str, fake: Callable[..., torch.Tensor]) -> Callable[[Any], Any]:
    """Makes an operator of a function; ``fake`` says what it gives from shapes alone.

    `torch.library.custom_op` does too, but each call of one takes twice as long, which a GPU that
    decodes token by token would wait for.
    """

    def define(function: Callable[..., torch.Tensor]) -> Any:
        name = function.__name__
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"entropress::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.entropress, name).default

    return define


def fuses(x: torch.Tensor, packed: torch.Tensor, layout: list[int]) -> bool:
    """Whether the product with ``x`` (..., cols) can be taken from the packed bytes themselves."""
    rows = x.numel() // layout[3]
    return on_gpu(packed) and x.dtype == dtype_of(layout) and 1 <= rows <= codec.cuda.MOST_ROWS


def _fake_unpack(
    packed: torch.Tensor, layout: list[int], first_row: int, rows: int
) -> torch.Tensor:
    return packed.new_empty((rows, layout[3]), dtype=dtype_of(layout))


@_operator("(Tensor packed, int[] layout, int first_row, int rows) -> Tensor", _fake_unpack)
def unpack(packed: torch.Tensor, layout: list[int], first_row: int, rows: int) -> torch.Tensor:
    """The weight's rows from ``first_row``, (rows, cols)."""
    found = rows_of(packed, layout, first_row, rows)
    return found.clone() if found.storage_offset() else found  # fake tensors begin at 0


def _fake_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    layout: list[int],
    bias: torch.Tensor | None,
    first_row: int,
    rows: int,
    fused: bool,
) -> torch.Tensor:
    weight = packed.new_empty((rows, layout[3]), dtype=dtype_of(layout))
    return functional.linear(x, weight, bias)


@_operator(
    "(Tensor x, Tensor packed, int[] layout, Tensor? bias, int first_row, int rows, bool fused) "
    "-> Tensor",
    _fake_linear,
)
def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    layout: list[int],
    bias: torch.Tensor | None,
    first_row: int,
    rows: int,
    fused: bool,
) -> torch.Tensor:
    """``x Wᵀ + bias``, (..., rows), for ``x`` (..., cols) and the weight's rows from ``first_row``.

    Bit for bit `torch.nn.functional.linear` with the dense rows, unless ``fused`` on a GPU with at
    most 8 rows of ``x``: then sums are fp32 in another order and rounded once.
    """
    if not (fused and fuses(x, packed, layout)):
        with lent_rows(packed, layout, first_row, rows) as weight:
            return functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    known = codec.Layout.from_ints(layout)
    y: torch.Tensor = codec.cuda.linear(flat, packed, known, bias, first_row, rows)
    return y.view(*x.shape[:-1], rows)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, packed, ctx.layout, bias, ctx.first_row, ctx.rows, _ = inputs
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(packed)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    to_x = to_bias = None
    flat = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        weight = unpack(*ctx.saved_tensors, ctx.layout, ctx.first_row, ctx.rows)
        product = flat.to(weight.dtype) @ weight
        to_x = product.view(*grad.shape[:-1], -1).to(ctx.dtypes[0])
    if ctx.needs_input_grad[3]:
        to_bias = flat.sum(0).to(ctx.dtypes[1])
    return to_x, None, None, to_bias, None, None, None


torch.library.register_autograd(
    "entropress::linear", _backward, setup_context=_remember, lib=_LIBRARY
)


def _under_autocast(
    x: torch.Tensor,
    packed: torch.Tensor,
    layout: list[int],
    bias: torch.Tensor | None,
    first_row: int,
    rows: int,
    fused: bool,
) -> torch.Tensor:
    """As `torch.nn.functional.linear` there: everything is cast to one dtype first.

    Being operations of their own, the casts are in what `torch.compile` records, too.
    """
    kind = packed.device.type
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if dtype == dtype_of(layout):
            y: torch.Tensor = linear(x, packed, layout, bias, first_row, rows, fused)
            return y
        return functional.linear(x, unpack(packed, layout, first_row, rows).to(dtype), bias)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _LIBRARY.impl("linear", _under_autocast, _key)


def _fake_embedding(ids: torch.Tensor, packed: torch.Tensor, layout: list[int]) -> torch.Tensor:
    return packed.new_empty((*ids.shape, layout[3]), dtype=dtype_of(layout))


@_operator("(Tensor ids, Tensor packed, int[] layout) -> Tensor", _fake_embedding)
def embedding(ids: torch.Tensor, packed: torch.Tensor, layout: list[int]) -> torch.Tensor:
    """The weight's rows ``ids`` (integers of any shape), (*ids.shape, cols).

    An id that is no row raises `IndexError`, on a GPU a device-side assertion, as
    `torch.nn.Embedding` does.
    """
    rows, cols = layout[2:4]
    if on_gpu(packed):
        known = codec.Layout.from_ints(layout)
        found: torch.Tensor = codec.cuda.rows(ids.long(), packed, known)
        return found
    wanted = ids.flatten().long()
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < rows:
        raise IndexError("index out of range in self")
    run = max(1, _RUN // cols) if layout[0] == STORED else codec.TILE_ROWS
    order = wanted.argsort()
    used, counts = (wanted[order] // run).unique_consecutive(return_counts=True)
    found = torch.empty((wanted.numel(), cols), dtype=dtype_of(layout))
    for k, at in zip(used.tolist(), order.split(counts.tolist()), strict=True):
        decoded = rows_of(packed, layout, k * run, min(run, rows - k * run))
        found[at] = decoded[wanted[at] - k * run]
    return found.view(*ids.shape, cols)
