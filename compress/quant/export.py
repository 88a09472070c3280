"""Quantized weights as a compressed-tensors checkpoint, which transformers and engines read.

Codes are packed (``pack-quantized``), and whole bytes (``int-quantized``) where the layers' inputs
are quantized too: so compressed-tensors 0.20 chooses itself, and so engines expect it. With zero
points they are whole bytes as well, for transformers 5.23 does not load packed ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.checkpoint import FLOATS, Checkpoint, NewTensor, TensorInfo, dense_config, rewrite
from compress.errors import BadInput, Missing
from compress.progress import SILENT, Progress
from compress.prune import stored_bytes
from compress.quant.layers import MERGED
from compress.quant.qtensor import QTensor, Scheme

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

Quantized = Callable[[str], QTensor]
Activations = Literal[8] | None
_Part = tuple[str, tuple[int, ...], Callable[[QTensor], "torch.Tensor"]]

_WHOLE, _PACKED, _BOTH = "int-quantized", "pack-quantized", "mixed-precision"
_STORED = {torch_name: name for name, torch_name in FLOATS.items()}


def export_quantized(
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme],
    quantized: Quantized,
    directory: Path,
    *,
    scale_dtype: torch.dtype | None = None,
    activations: Activations = None,
    skipped: Mapping[str, str] | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> tuple[Checkpoint, dict[str, str]]:
    """Write the checkpoint with the weights named in ``schemes`` as codes and scales.

    ``quantized`` is asked for one weight at a time, in the order of the files, and its answer
    dropped before the next; what it gives must be of the scheme, the weight's shape and
    ``scale_dtype`` (None: the weight's own dtype). ``activations`` 8: the inputs of those layers
    are rounded to 8 bits, by token, as the model runs. ``skipped``: the other linear weights, which
    the config lists as ignored. All else is kept as it is, a coded checkpoint decoded on the way,
    but for tensors of ``replaced``, of the same shapes. ``config``: what the new one is to say
    beside its quantization, None for what the old one does.

    Returns the new checkpoint, and by its new tensors' names that of the weight they are of. Raises
    `BadInput` where nothing is to be quantized, the model is already, its experts are merged as it
    is loaded, a name is not that of a matrix, groups do not divide it, ``quantized`` gives
    something else or a replacement does not fit; `Missing` without compressed-tensors.
    """
    infos = checkpoint.tensor_infos()
    written = dense_config(dict(config or checkpoint.config))
    if "quantization_config" in written:
        raise BadInput("is already quantized", where=checkpoint.path, mend="pass the original")
    if not schemes:
        raise BadInput("has no weight to quantize", where=checkpoint.path)
    if MERGED in (skipped or {}).values():
        # transformers 5.23 would look for codes in every expert, and find none.
        raise BadInput(f"cannot be loaded once quantized: its {MERGED}", where=checkpoint.path)
    parts = {
        name: _parts(_matrix(infos, name, scheme), scheme, scale_dtype, activations)
        for name, scheme in schemes.items()
    }
    written["quantization_config"] = _config(schemes, activations, skipped or {})
    new = {name: stored_bytes(name, value, infos) for name, value in (replaced or {}).items()}

    @lru_cache(maxsize=1)
    def made(name: str) -> QTensor:
        return _checked(quantized(name), infos[name], schemes[name], scale_dtype)

    def taken(name: str, take: Callable[[QTensor], torch.Tensor]) -> Iterator[Buffer]:
        yield _bytes(take(made(name)))

    def transform(info: TensorInfo) -> Iterator[NewTensor]:
        if info.name not in parts:
            chunks = [new[info.name]] if info.name in new else checkpoint.chunks(info.name)
            yield NewTensor(info.name, info.dtype, info.shape, chunks)
            return
        for part, (dtype, shape, take) in parts[info.name].items():
            yield NewTensor(part, dtype, shape, taken(info.name, take))

    done, _ = rewrite(
        checkpoint,
        directory,
        transform,
        config=written,
        metadata={"format": "pt"} if checkpoint.coded else None,
        progress=progress,
        label="quantizing",
    )
    return done, {part: name for name in parts for part in parts[name]}


def _parts(
    info: TensorInfo, scheme: Scheme, scale_dtype: torch.dtype | None, activations: Activations
) -> dict[str, _Part]:
    """The tensors that a weight becomes: by name the dtype, the shape and what of it it holds."""
    (rows, columns), bits = info.shape, scheme.bits
    groups = columns // (scheme.group or columns)
    scale = info.dtype if scale_dtype is None else _STORED[_torch_name(scale_dtype)]
    stored: dict[str, _Part] = {}
    if _format(scheme, activations) == _WHOLE:
        stored[""] = ("I8", (rows, columns), lambda q: q.codes)
    else:
        stored["_packed"] = ("I32", (rows, -(-columns * bits // 32)), _pack)
        stored["_shape"] = ("I64", (2,), _shape)
    stored["_scale"] = (scale, (rows, groups), lambda q: q.scale)
    if not scheme.symmetric:
        stored["_zero_point"] = ("I8", (rows, groups), _zero)
    return {info.name + suffix: part for suffix, part in stored.items()}


def _pack(q: QTensor) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(q.codes, q.scheme.bits)


def _shape(q: QTensor) -> torch.Tensor:
    import torch

    return torch.tensor(q.codes.shape)


def _zero(q: QTensor) -> torch.Tensor:
    assert q.zero is not None  # `_checked`
    return q.zero


def _format(scheme: Scheme, activations: Activations) -> str:
    whole = activations is not None or not scheme.symmetric
    return _WHOLE if whole else _PACKED


def _config(
    schemes: Mapping[str, Scheme], activations: Activations, skipped: Mapping[str, str]
) -> dict[str, Any]:
    """``quantization_config``: a group of layers, named one by one, for each scheme."""
    try:
        from compressed_tensors import __version__
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )
    except ImportError:
        raise Missing(
            "compressed-tensors is not installed", mend="run: pip install compressed-tensors"
        ) from None

    layers: defaultdict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        layers[scheme].append(layer_name(name))
    inputs = activations and QuantizationArgs(
        num_bits=activations, strategy="token", symmetric=True, dynamic=True
    )
    formats = [_format(scheme, activations) for scheme in layers]
    groups = {
        f"group_{i}": QuantizationScheme(
            targets=layers[scheme],
            weights=QuantizationArgs(
                num_bits=scheme.bits,
                symmetric=scheme.symmetric,
                strategy="group" if scheme.group else "channel",
                group_size=scheme.group,
            ),
            input_activations=inputs,
            format=formats[i],
        )
        for i, scheme in enumerate(layers)
    }
    stated = QuantizationConfig(
        config_groups=groups,
        format=formats[0] if len(set(formats)) == 1 else _BOTH,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[layer_name(name) for name in skipped],
    )
    return {"version": __version__, **stated.model_dump(mode="json")}


def _matrix(infos: Mapping[str, TensorInfo], name: str, scheme: Scheme) -> TensorInfo:
    info = infos.get(name)
    if info is None or not name.endswith(".weight") or len(info.shape) != 2:
        raise BadInput("is not the weight of a linear layer", where=name)
    if info.dtype not in FLOATS or info.dtype == "F64":
        raise BadInput("cannot be quantized", where=name, got=info.dtype)
    if scheme.group and info.shape[1] % scheme.group:
        raise BadInput(
            f"groups of {scheme.group} do not divide {info.shape[1]} columns", where=name
        )
    return info


def _checked(
    q: QTensor, info: TensorInfo, scheme: Scheme, scale_dtype: torch.dtype | None
) -> QTensor:
    """What a quantizer gave, if the header already written fits it."""
    groups = info.shape[1] // (scheme.group or info.shape[1])
    dtype = FLOATS[info.dtype] if scale_dtype is None else _torch_name(scale_dtype)
    got = (q.scheme, tuple(q.codes.shape), tuple(q.scale.shape), _torch_name(q.scale.dtype))
    expected = (scheme, info.shape, (info.shape[0], groups), dtype)
    if got != expected or (q.zero is None) != scheme.symmetric:
        raise BadInput(
            "was quantized in another way than announced",
            where=info.name,
            got=got,
            expected=expected,
        )
    return q


def layer_name(name: str) -> str:
    """The layer that a weight is of."""
    return name.removesuffix(".weight")


def _torch_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy())
