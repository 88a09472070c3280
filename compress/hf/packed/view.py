"""What ``module.weight`` answers where the weight is packed: a tensor that decodes when it is used.

Shape, dtype and device are known without decoding. Everything else works on the decoded values and
gives ordinary tensors, except that nothing may be written: an in-place change of a copy would be
lost without a word, as LoRA adapters merged into packed weights otherwise are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from compress.errors import BadInput

_METADATA = {
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__", "__hash__"),
    *("is_complex", "is_floating_point", "is_contiguous", "stride", "storage_offset"),
    *("get_device", "data_ptr", "untyped_storage"),
}
_NOT_IN_PLACE = ("__invert__", "__int__", "__index__", "__init__", "__iter__")


class WeightView(torch.Tensor):
    """A read-only tensor whose values ``decode`` gives, all if called with None, else one item.

    ``place``: equal for views of the same weight; None for what is computed from one.
    """

    _decode: Callable[[int | None], torch.Tensor]
    place: tuple[int, int] | None

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        decode: Callable[[int | None], torch.Tensor],
        place: tuple[int, int] | None = None,
    ) -> WeightView:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._decode, made.place = decode, place
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = next(iter((*args, *kwargs.values())), None)
        if isinstance(target, WeightView):
            if _writes(name, args, kwargs):
                raise read_only()
            if name == "__get__" or name in _METADATA:
                return super().__torch_function__(func, types, args, kwargs)
            if name == "__set__" or name == "requires_grad_":
                return target
            if name == "__getitem__" and (item := _item(target, args[1])) is not None:
                return _read_only(target._decode(item))
        return _on_decoded(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What comes from below Python, or from code that overrides `__torch_function__`."""
        kwargs = kwargs or {}
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | {**kwargs}
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given.get(argument.name), WeightView):
                raise read_only()
        if func is torch.ops.aten.detach.default:  # also of `.data`
            view = args[0]
            return WeightView(view.shape, view.dtype, view.device, view._decode)
        return _on_decoded(func, args, kwargs)


def read_only() -> BadInput:
    """The error of everything that would change a packed weight."""
    return BadInput(
        "packed weights cannot be changed",
        mend="load the model without packed= to merge, tie, resize or train them",
    )


def _writes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function called so with a view as its first argument changes it."""
    if name in ("__set__", "requires_grad_"):  # requires_grad = False is no change
        given = kwargs.get("requires_grad", args[-1])
        return not (given is False or given is None)
    dunder = name.startswith("__") and name.endswith("__")
    in_place = name[2:3] == "i" and name not in _NOT_IN_PLACE if dunder else name.endswith("_")
    return in_place or name == "__setitem__" or bool(kwargs.get("inplace"))


def _item(view: WeightView, index: Any) -> int | None:
    """The place along the first dimension that an index names, None for any other index."""
    if isinstance(index, torch.Tensor):
        whole = not (index.dtype.is_floating_point or index.dtype == torch.bool)
        index = int(index) if index.dim() == 0 and whole else None
    if isinstance(index, bool) or not isinstance(index, int):
        return None
    if not -len(view) <= index < len(view):
        raise IndexError(f"index {index} is out of bounds for dimension 0 with size {len(view)}")
    return index % len(view)


def _read_only(dense: torch.Tensor) -> WeightView:
    def decode(item: int | None) -> torch.Tensor:
        return dense if item is None else dense[item]

    return WeightView(dense.shape, dense.dtype, dense.device, decode)


def _on_decoded(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """``func`` of the decoded values; what shares their memory is read-only in its turn."""
    storages = set()

    def decoded(value: Any) -> Any:
        if not isinstance(value, WeightView):
            return value
        dense = value._decode(None)
        storages.add(dense.untyped_storage().data_ptr())
        return dense

    def guarded(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in storages:
            return _read_only(value)
        return value

    if any(isinstance(value, WeightView) for value in _targets(kwargs.get("out"))):
        raise read_only()
    return tree_map(guarded, func(*tree_map(decoded, args), **tree_map(decoded, kwargs)))


def _targets(out: Any) -> Sequence[Any]:
    return out if isinstance(out, tuple | list) else (out,)
