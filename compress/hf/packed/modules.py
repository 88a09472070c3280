"""Modules that hold packed weights: `PackedLinear`, `PackedEmbedding`, and what they share.

They are made by `compress.hf.packed.adopt` from loaded modules, whose class is exchanged; a weight
is a uint8 buffer and a `Packing`, and the parameter's name answers with a read-only view of it.
Tied modules share both, and keep sharing them when they are moved or copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.errors import BadInput, did_you_mean
from compress.hf.packed import EXACT
from compress.hf.packed.forms import check, dtype_of, form_for, form_of, on_gpu, pack, rows_of
from compress.hf.packed.ops import embedding, linear, unpack
from compress.hf.packed.view import WeightView, read_only


@dataclass
class Packing:
    """What the host knows of a packed weight.

    ``buffer``: the name of the module's buffer; ``ints``: see `forms`, one list for all modules
    that share the buffer; ``shape``: the weight's, whose rows begin at the buffer's ``first_row``;
    ``fused``: whether products may sum in another order than the dense model's.
    """

    buffer: str
    ints: list[int]
    shape: tuple[int, ...]
    first_row: int = 0
    fused: bool = False

    @property
    def rows(self) -> int:
        """Rows of ``shape`` as a matrix of all but its last dimension."""
        return int(torch.Size(self.shape[:-1]).numel())

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.ints)

    @property
    def form(self) -> str:
        return form_of(self.ints)


class Packed(nn.Module):
    """A module some of whose weights are packed; ``packings``: how, by the weight's name.

    `load_state_dict` accepts packed bytes only after `check`. Moving to a GPU packs stored weights
    anew in the layout that suits it. Weights cannot be set, changed, cast or trained: `BadInput`.
    """

    packings: dict[str, Packing]

    def dense(self, name: str = "weight", item: int | None = None) -> torch.Tensor:
        """An ordinary tensor with the values of a packed weight, or of an item of it."""
        own, packed = self.packings[name], self.get_buffer(self.packings[name].buffer)
        if item is None:
            return unpack(packed, own.ints, own.first_row, own.rows).view(own.shape)
        rows = own.rows // own.shape[0]
        found = unpack(packed, own.ints, own.first_row + item * rows, rows)
        return found.view(own.shape[1:])

    def _view(self, name: str) -> torch.Tensor:
        """What the weight's name answers with."""
        if torch.compiler.is_compiling():
            return self.dense(name)
        own = self.packings[name]
        packed = self.get_buffer(own.buffer)
        decode = functools.partial(self.dense, name)
        return WeightView(own.shape, own.dtype, packed.device, decode, self._place(name))

    def _place(self, name: str) -> tuple[int, int]:
        """What tells a packed weight from others."""
        return id(self.get_buffer(self.packings[name].buffer)), self.packings[name].first_row

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """Asked of this very module also the views, which refuse to be trained.

        So PEFT's ``modules_to_save`` is heard. The model's own `parameters` leave them out.
        """
        yield from super().parameters(recurse)
        yield from (self._view(name) for name in self.packings)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("packings", ()):
            super().__setattr__(name, value)
        elif getattr(value, "place", None) != self._place(name):
            raise read_only()  # to tie what is tied is no change

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        own = {packing.buffer: packing for packing in self.packings.values()}
        buffers = {name: self.get_buffer(name) for name in own}
        for name, packing in own.items():
            probe = fn(torch.empty(0, dtype=packing.dtype, device=buffers[name].device))
            if probe.dtype != packing.dtype:
                raise BadInput(
                    "packed weights keep their dtype",
                    got=str(probe.dtype).removeprefix("torch."),
                    expected=str(packing.dtype).removeprefix("torch."),
                    mend="load the model without packed= to cast it",
                )
        for name in own:  # their values are no numbers to be cast
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)
        for name, packing in own.items():
            held, moved = buffers[name], fn(buffers[name])
            if moved.is_meta or held.is_meta:
                self._buffers[name] = moved
            elif moved is not held:
                _replace(held, packing.ints, moved, packing.ints)
        return self

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for packing in self.packings.values():
            given = state.get(key := prefix + packing.buffer)
            if given is None:
                continue
            ints, known = check(given, key), packing.ints
            if ints[1:4] != known[1:4]:
                raise BadInput(
                    "is another weight",
                    where=key,
                    got=f"{dtype_of(ints)} {ints[2:4]}",
                    expected=f"{dtype_of(known)} {known[2:4]}",
                )
            held = self.get_buffer(packing.buffer)
            _replace(held, known, given.to(held.device), ints)
            state = {**state, key: held}
        super()._load_from_state_dict(state, prefix, *args)


class PackedLinear(Packed, nn.Linear):
    """`torch.nn.Linear` whose weight is packed."""

    weight = property(lambda self: self._view("weight"))
    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        own = self.packings["weight"]
        x = input
        bias: torch.Tensor | None = self.bias
        if input.dtype == torch.float32 and not torch.is_autocast_enabled(input.device.type):
            # Norms and biases are fp32 where PEFT has prepared a quantized model for training.
            x, bias = input.to(own.dtype), None if bias is None else bias.to(own.dtype)
        y: torch.Tensor = linear(x, self.packed, own.ints, bias, own.first_row, own.rows, own.fused)
        return y if x is input else y.to(input.dtype)


class PackedEmbedding(Packed, nn.Embedding):
    """`torch.nn.Embedding` whose weight is packed."""

    weight = property(lambda self: self._view("weight"))
    packed: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return embedding(input, self.packed, self.packings["weight"].ints)


def adopt(module: nn.Module, packed: torch.Tensor, ints: list[int], exact: str = "logits") -> None:
    """Turn a Linear or Embedding, in place, into one whose weight is ``packed``.

    ``ints``: see `forms`; ``exact``: ``logits``, products as the dense model takes them, or
    ``weights``, the same weights summed in another order where that is faster. Tied modules are
    given the same tensor and the same list. A subclass keeps its own forward. Raises `BadInput`
    for another kind of module, another shape or dtype than the weight has, and an embedding that
    changes its weight (``max_norm``).
    """
    kind = next((k for k in (nn.Linear, nn.Embedding) if isinstance(module, k)), None)
    if kind is None or getattr(module, "max_norm", None) is not None:
        changes = " with max_norm" if kind else ""
        raise BadInput(f"a {type(module).__name__}{changes} cannot hold a packed weight")
    packed_kind = PackedLinear if kind is nn.Linear else PackedEmbedding
    install(module, packed_kind, {"weight": Packing("packed", ints, ())}, [packed], exact)


def install(
    module: nn.Module,
    kind: type[Packed],
    packings: dict[str, Packing],
    buffers: list[torch.Tensor],
    exact: str,
) -> None:
    """Exchange the class and put buffers in place of parameters, whose shapes packings take over.

    Raises `BadInput`, with the module as it was, where shape or dtype differ from a parameter's.
    """
    if exact not in EXACT:
        raise BadInput(f"unknown exactness '{exact}'", mend=did_you_mean(exact, EXACT))
    for name, packing in packings.items():
        weight = getattr(module, name)
        shape = torch.Size([packing.ints[2], packing.ints[3]])
        if weight.dtype != packing.dtype or weight.flatten(0, -2).shape != shape:
            raise BadInput(
                "is another weight",
                where=name,
                got=f"{packing.dtype} {tuple(shape)}",
                expected=f"{weight.dtype} {tuple(weight.shape)}",
            )
        packing.shape, packing.fused = tuple(weight.shape), exact == "weights"
    for name in packings:
        del module._parameters[name]
        # So `get_buffer` gives the view, and transformers' `tie_weights` finds it.
        module._buffers[name] = None
    kinds: tuple[Any, Any] = (type(module), kind)
    module.__class__ = _class_of(*kinds, tuple(packings))
    assert isinstance(module, Packed)
    module.packings = packings
    for packing, packed in zip(packings.values(), buffers, strict=True):
        module.register_buffer(packing.buffer, packed)


@functools.cache
def _class_of(original: Any, kind: Any, names: tuple[str, ...]) -> Any:
    """``original`` with ``kind`` behind it, which its ``super()`` calls then reach."""
    if original in kind.__bases__:
        return kind
    views = {name: property(functools.partial(Packed._view, name=name)) for name in names}
    return type(f"Packed{original.__name__}", (original, kind), views)


def _replace(held: torch.Tensor, ints: list[int], new: torch.Tensor, new_ints: list[int]) -> None:
    """Give the tensor ``held`` and its ``ints`` another packed weight, where ``new`` is.

    In place, for all modules that share them.
    """
    if form_of(new_ints) == "stored" and on_gpu(new):
        dense = rows_of(new.cpu(), new_ints).to(new.device)
        made = pack(dense, form_for(new.device, dense.dtype), smaller=False)
        assert made is not None
        new, new_ints = made
    held.data = new
    ints[:] = new_ints
