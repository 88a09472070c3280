"""Weights packed on their way into a model, one at a time, so that it is never there dense.

transformers' loader runs an operation of the quantizer on each weight, after renaming, merging,
casting and placement. Ours puts in its place a parameter that looks like it and holds one number;
once all are tied and placed, the modules themselves become packed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import nan
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.core_model_loading import ConversionOps
from transformers.integrations.accelerate import get_device
from transformers.utils import logging

from compress import codec
from compress.errors import BadInput, Missing
from compress.hf.packed import experts, forms, merged, modules

HALVES = tuple(forms.DTYPES.values())
_BYTES = 1.5  # a packed weight, at most, for planning where weights go
_DENSE = "load it without EntropressConfig(packed=...)"
_logger = logging.get_logger("transformers.entropress")  # below transformers', for its handlers


def check_dtype(dtype: torch.dtype) -> None:
    """`BadInput` for a model to be loaded in a dtype of which no weight could be packed."""
    if dtype not in HALVES:
        raise BadInput(
            "only 16-bit floats can be packed",
            got=str(dtype).removeprefix("torch."),
            expected="bfloat16 or float16",
            mend=f"pass dtype='bfloat16', or {_DENSE}",
        )


def check_devices(device_map: dict[str, Any], form: str) -> None:
    """Refuse places where packed weights cannot be, before anything is loaded.

    ``device_map``: as `from_pretrained` takes it, resolved. Raises `BadInput`, or `Missing` where
    there is no CUDA device.
    """
    kinds = {_kind(device) for device in device_map.values()}
    if other := sorted(kinds - {"cpu", "cuda"}):
        raise BadInput(
            "packed weights cannot be there",
            where="device_map",
            got=other[0],
            expected="the CPU or CUDA devices",
            mend=_DENSE,
        )
    if len(kinds) > 1:
        raise BadInput(
            "packed weights are not offloaded",
            where="device_map",
            got="CPU and CUDA",
            expected="one of them",
            mend="they need less room: try device_map='cuda', or several CUDA devices",
        )
    if "cuda" in kinds and form == "stored":
        raise BadInput(
            "packed='stored' is decoded by the CPU",
            where="device_map",
            got="a CUDA device",
            mend="pass packed='auto', 'fast' or 'dense'",
        )
    if "cuda" in kinds and not torch.cuda.is_available():
        raise Missing(
            "no CUDA device can be used",
            where="device_map",
            mend="install torch for CUDA, or load without device_map: the CPU decodes as well",
        )


def check_ties(model: Any, device_map: dict[str, Any] | None) -> None:
    """`BadInput` for tied weights, of which one is packed for both, on different devices."""
    for target, source in model.all_tied_weights_keys.items():
        places = {name: str(get_device(device_map, name)) for name in (source, target)}
        if len(set(places.values())) > 1:
            raise BadInput(
                "tied weights must be on one device to be packed",
                where="device_map",
                got=", ".join(f"{name} on {place}" for name, place in places.items()),
            )


class Packer(ConversionOps):
    """The operation of one load: which weights are packed, how, and what became of them.

    ``model``: its skeleton; ``dtype``: of its weights; ``form``, ``exact``: as in EntropressConfig;
    ``keep_zeros``: leave weights dense that are all zero, for `skip_sublayers` to look at.
    ``files``: the quantizer's `CodedTensor` by the tensor just read; what casts, moves,
    cuts or merges it gives another.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, form: str, exact: str, keep_zeros: bool
    ) -> None:
        self.form = form
        self.exact = exact
        self.keep_zeros = keep_zeros
        self.files = WeakTensorKeyDictionary()
        self.ties = dict(model.all_tied_weights_keys)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.waiting = {
            name
            for name, parameter in parameters.items()
            if parameter.dtype == dtype and _packable(*_owner(model, name))
        }
        self.expected_nbytes = sum(
            int(parameter.numel() * self.element_size(name, parameter))
            for name, parameter in parameters.items()
            if name not in self.ties
        )
        self._tied_names = sorted({*self.ties, *self.ties.values()})
        self._made: dict[str, nn.Parameter] = {}

    def element_size(self, name: str, parameter: torch.Tensor) -> float:
        """Bytes that an element of a parameter will take."""
        return _BYTES if name in self.waiting else parameter.element_size()

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Around the loader: errors of packing end it, and come out as what they are."""
        try:
            yield
        except _Stopped as stopped:
            self._explain(stopped.error)
        except (MemoryError, torch.OutOfMemoryError) as error:
            self._explain(error)

    def _explain(self, error: Exception) -> None:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise error
        raise Missing(
            "not enough memory to load the model packed",
            expected=f"about {self.expected_nbytes:,} bytes and its largest weight twice",
            mend="free some, or spread it over several GPUs with device_map='auto'",
        ) from error

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Placeholders for packed weights; what stays dense, unchanged."""
        try:
            return {name: self._pack(name, input_dict) for name in list(input_dict)}
        except Exception as error:
            # The loader would note an `Exception` down and go on.
            raise _Stopped(error) from error

    def _pack(self, name: str, given: dict[str, Any]) -> torch.Tensor:
        """What takes the place of the tensor of that name, which is taken out of ``given``."""
        tensor: torch.Tensor = given[name][0] if isinstance(given[name], list) else given[name]
        del given[name]
        if name not in self.waiting:
            return tensor
        self.waiting.remove(name)  # so that the loader compares its shape
        if tensor.dtype not in HALVES or (self.keep_zeros and not tensor.any()):
            return tensor
        form = forms.form_for(tensor.device, tensor.dtype) if self.form == "auto" else self.form
        placeholder = self._placeholder(name, tensor)
        file = self._file(tensor) if form == "stored" else None
        if file is None:
            made = forms.pack(tensor, form, name)
            if made is None:
                return tensor
        else:
            del tensor  # so that the bytes take its room, and leave no hole in the heap
            made = forms.from_stored(file.stored())
        placeholder.packed = made  # type: ignore[attr-defined]
        self._made[name] = placeholder
        return placeholder

    def _placeholder(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        # Those of tied weights differ, for the loader ties what is equal.
        value = float(self._tied_names.index(name)) if name in self._tied_names else nan
        one = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
        return nn.Parameter(one.expand(tensor.shape), requires_grad=False)

    def _file(self, tensor: torch.Tensor) -> Any:
        """Where the tensor was read, if it is still what was, and was smaller; None otherwise."""
        if tensor.is_inference() or tensor not in self.files or tensor._version:
            return None
        file = self.files[tensor]
        return file if file.stored_nbytes < tensor.nbytes else None

    def share_equal(self, model: Any) -> None:
        """Give equal tied weights that the checkpoint holds twice one placeholder."""
        for target, source in self.ties.items():
            first, second = self._made.get(source), self._made.get(target)
            if first is not None and second is not None and _equal(first, second):
                module, leaf = _owner(model, target)
                module.register_parameter(leaf, first)

    def install(self, model: Any) -> None:
        """Make packed modules of those that hold placeholders; a warning if there are none."""
        if not self._made:
            _logger.warning("no weight is smaller packed as %r: the model is dense", self.form)
        for module in list(model.modules()):
            weights: dict[str, Any] = {
                leaf: parameter.packed
                for leaf, parameter in module._parameters.items()
                if hasattr(parameter, "packed")
            }
            for blob, ints in weights.values():
                forms.prepare(blob, ints, self.exact)
            if not weights:
                continue
            with _without_hook(module):
                if isinstance(module, nn.Linear | nn.Embedding):
                    blob, ints = weights["weight"]
                    modules.adopt(module, blob, ints, self.exact)
                else:
                    experts.adopt(module, weights)
        if self.exact == "weights":
            merged.merge(model)
        self._made.clear()


class _Stopped(BaseException):
    """Carries an error past the loader's own handling of errors."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _packable(module: nn.Module, leaf: str) -> bool:
    if isinstance(module, nn.Embedding):
        return leaf == "weight" and module.max_norm is None
    if isinstance(module, nn.Linear):
        return leaf == "weight"
    return leaf in experts.packable(module)


def _owner(model: Any, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _equal(one: Any, other: Any) -> bool:
    """Whether two placeholders stand for the same weight; the front of coded bytes names it."""
    (blob, ints), (other_blob, other_ints) = one.packed, other.packed
    if ints != other_ints:
        return False
    front = _header(blob).size if ints[0] == forms.STORED else 0
    return torch.equal(blob[front:], other_blob[front:])


def _header(blob: torch.Tensor) -> codec.Header:
    return codec.read_header(blob[: codec.HEADER_MAX].numpy().data)


def _kind(device: Any) -> str:
    if isinstance(device, int):
        return "cuda"
    return "disk" if device == "disk" else torch.device(device).type


@contextmanager
def _without_hook(module: nn.Module) -> Iterator[None]:
    """accelerate's hook, which holds the forward of the class as it was, taken off and put on."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    vars(module).pop("forward")  # so that the class's is found again
    yield
    add_hook_to_module(module, hook)
