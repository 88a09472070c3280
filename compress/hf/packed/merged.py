"""Projections of one input as one product: query, key and value, or gate and up.

A product that reads packed weights takes one launch, and key and value alone are too small to
occupy a GPU. Their rows are therefore packed together. The first of them that is called computes
all and keeps what the others will be asked for. Where they turn out to be called with something
else, as key and value of a cross-attention are, each computes its own rows from then on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from compress.codec import packed as codec
from compress.hf.packed.forms import form_of, on_gpu, pack
from compress.hf.packed.modules import PackedLinear, Packing
from compress.hf.packed.ops import fuses, linear

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class _Product:
    """Of ``x``, whose ``version`` counts changes in place; ``parts``: by first row, those that have
    not been asked for."""

    x: torch.Tensor
    version: int
    parts: dict[int, torch.Tensor]


@dataclass
class _Group:
    """Modules whose rows follow one another in one packed weight.

    ``last``: the product of all, while parts of it wait; ``apart``: whether parts were left over.
    Another thread may set either at any moment, but no product is mistaken for another's.
    """

    members: list[PackedLinear]
    last: _Product | None = None
    apart: bool = False

    def part(self, x: torch.Tensor, own: Packing) -> torch.Tensor | None:
        """Of the product with ``x`` the rows of ``own``; None where each is to compute its own."""
        first = self.members[0]
        if self.apart or not fuses(x, first.packed, own.ints) or _tracked(x, self.members):
            return None
        last = self.last
        if last is not None and not (x is last.x and x._version == last.version):
            self.last, self.apart = None, True
            return None
        part = None if last is None else last.parts.pop(own.first_row, None)
        if last is None or part is None:
            biases = [member.bias for member in self.members if member.bias is not None]
            bias = torch.cat([*biases]) if biases else None
            y = linear(x, first.packed, own.ints, bias, 0, own.ints[2], True)
            sizes = [member.out_features for member in self.members]
            starts = [member.packings["weight"].first_row for member in self.members]
            parts = (part.contiguous() for part in y.split(sizes, -1))
            last = _Product(x, x._version, dict(zip(starts, parts, strict=True)))
            part = last.parts.pop(own.first_row)
            self.last = last
        if not last.parts:
            self.last = None
        return part


class MergedLinear(PackedLinear):
    """A `PackedLinear` that is one of a group."""

    group: _Group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        part = self.group.part(input, self.packings["weight"])
        return super().forward(input) if part is None else part


def merge(model: nn.Module) -> int:
    """Merge what can be merged in a model on GPUs, in place; the number of groups.

    Only plain Linear modules with ``exact="weights"``, packed in one layout on one GPU, not tied,
    all with a bias or none, and all but the last with a multiple of 32 rows.
    """
    held = [module for module in model.modules() if isinstance(module, PackedLinear)]
    uses: dict[int, int] = {}
    for module in held:
        uses[id(module.packed)] = uses.get(id(module.packed), 0) + 1
    groups = 0
    for members in _siblings(model):
        if all(uses[id(member.packed)] == 1 for member in members) and _alike(members):
            groups += _merge(members)
    return groups


def _siblings(model: nn.Module) -> Iterator[list[PackedLinear]]:
    for parent in model.modules():
        for names in _GROUPS:
            members = [parent._modules.get(name) for name in names]
            plain = [member for member in members if type(member) is PackedLinear]
            if len(plain) == len(names):
                yield plain


def _alike(members: list[PackedLinear]) -> bool:
    packings = [member.packings["weight"] for member in members]
    kinds = {
        (own.form, own.dtype, own.shape[1], own.fused, member.bias is None, member.packed.device)
        for member, own in zip(members, packings, strict=True)
    }
    whole_tiles = all(own.rows % codec.TILE_ROWS == 0 for own in packings[:-1])
    return len(kinds) == 1 and whole_tiles and packings[0].fused and on_gpu(members[0].packed)


def _merge(members: list[PackedLinear]) -> bool:
    form = form_of(members[0].packings["weight"].ints)
    made = pack(torch.cat([member.dense() for member in members]), form)
    if made is None:
        return False
    packed, ints = made
    group, first = _Group(members), 0
    for member in members:
        shape = member.packings["weight"].shape
        member.packings = {"weight": Packing("packed", ints, shape, first, fused=True)}
        member.packed = packed
        member.__class__ = MergedLinear
        member.group = group
        first += shape[0]
    return True


def _tracked(x: torch.Tensor, members: list[PackedLinear]) -> bool:
    """Whether autograd records the product, or nobody counts what is done to ``x`` in place."""
    grads = (t.requires_grad for t in (x, *(m.bias for m in members if m.bias is not None)))
    return x.is_inference() or (torch.is_grad_enabled() and any(grads))
