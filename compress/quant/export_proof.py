"""Proof that a quantized checkpoint loads as the model that its codes and scales stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import CheckFailed, EntropressError
from compress.quant.export import Activations, Quantized, layer_name

if TYPE_CHECKING:
    import torch

_PROOF = (2, 16)  # sequences and tokens


def prove_export(
    source: Checkpoint,
    exported: Checkpoint,
    names: Iterable[str],
    quantized: Quantized,
    *,
    activations: Activations = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
    tokens: torch.Tensor | None = None,
) -> None:
    """Check that transformers makes of the export the model that the codes stand for, to the bit.

    That model is the source's with the weights ``names`` replaced by `QTensor.dense`, in the dtype
    it is computed in, other parameters by those of ``replaced``, and with ``activations`` 8 the
    inputs of those layers rounded as compressed-tensors does. The weights are compared, which few
    tokens could not tell apart in 16 bits, and the logits of ``tokens``: int64 [sequences, length];
    None: a few. Raises `CheckFailed` where a bit differs, where transformers cannot load or run the
    export, and where a layer's input cannot be rounded by token.
    """
    import torch

    reference = source.load_model()
    if tokens is None:
        vocabulary = reference.get_input_embeddings().num_embeddings
        tokens = (torch.arange(_PROOF[0] * _PROOF[1]) * 7 + 1).reshape(_PROOF) % vocabulary
    for name, value in (replaced or {}).items():
        reference.get_parameter(name).data.copy_(value)
    weights = {}
    for name in names:
        layer = reference.get_submodule(layer_name(name))
        layer.weight.data.copy_(quantized(name).dense(layer.weight.dtype))
        weights[name] = _sha256(layer.weight)
        if activations:
            layer.register_forward_pre_hook(partial(_round_input, name))
    expected = _logits(reference, tokens)
    del reference
    try:
        model = exported.load_model()
        found = _logits(model, tokens)  # the first pass unpacks the weights
    except EntropressError:
        raise
    except Exception as error:  # of whatever kind transformers or the model raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckFailed(f"transformers cannot use it: {reason}", where=exported.path) from error
    for name, digest in weights.items():
        if _sha256(model.get_submodule(layer_name(name)).weight) != digest:
            raise CheckFailed("loads as another weight", where=f"{exported.path}: {name}")
    if expected.dtype != found.dtype or expected.shape != found.shape:
        raise CheckFailed("loads as another model", where=exported.path)
    differ = (_words(expected) != _words(found)).sum().item()
    if differ:
        raise CheckFailed(
            "computes something else than its codes stand for",
            where=exported.path,
            got=f"{differ} of {found.numel()} logits with other bits, by up to "
            f"{(expected - found).abs().max():.3g}",
        )


def _sha256(weight: torch.Tensor) -> str:
    import torch

    return hashlib.sha256(weight.detach().contiguous().view(torch.uint8).numpy()).hexdigest()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's first output."""
    import torch

    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.inference_mode():
        return model(**inputs)[0].contiguous()


def _round_input(name: str, layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round a layer's input to 8 bits by token, as compressed-tensors does while a model runs.

    Of an input without an axis of sequences it would round all tokens of a batch together.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    if args[0].ndim < 3:
        raise CheckFailed(
            "its inputs would not be rounded by token",
            where=name,
            got=f"{args[0].ndim} dimensions",
            expected="sequences, tokens and features",
            mend="leave this layer out",
        )
    rounding = QuantizationArgs(num_bits=8, strategy="token", symmetric=True, dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(args[0], rounding, layer)
    return (fake_quantize(args[0], scale, zero, rounding), *args[1:])
