"""Proof that a bitsandbytes checkpoint loads as what bitsandbytes makes of the source."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint, dense_config
from compress.errors import CheckFailed, EntropressError
from compress.prune import model_config
from compress.quant.bnb_parts import Kind
from compress.quant.export import layer_name

if TYPE_CHECKING:
    import torch

_PROOF = (2, 16)  # sequences and tokens


def prove_bnb(source: Checkpoint, exported: Checkpoint, names: Iterable[str], kind: Kind) -> None:
    """Check that plain transformers loads the export as the source quantized by bitsandbytes.

    The layers of ``names`` and no others are quantized; each of their weights dequantizes to what
    bitsandbytes' functions give for the source's; all tensors, and the logits of a few tokens,
    which are finite, are those of the model that transformers makes by quantizing the source as it
    loads it, with the same config. All are compared bit for bit, on the CPU. Raises `CheckFailed`
    where one differs and where transformers cannot load or run the export.
    """
    chosen = list(names)
    try:
        model = exported.load_model()
        _check_layers(exported, model, chosen, kind)
        _check_weights(source, exported, model, chosen)
        reference = _quantized_by_transformers(source, model)
        _check_tensors(exported, model, reference)
        # Only now: where the CPU has AVX512-BF16, the first pass packs the weights in another way.
        with _quiet():
            found, expected = _logits(model), _logits(reference)
    except EntropressError:
        raise
    except Exception as error:  # of whatever kind transformers, bitsandbytes or the model raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckFailed(f"transformers cannot use it: {reason}", where=exported.path) from error
    if not found.isfinite().all():
        raise CheckFailed("computes logits that are not finite", where=exported.path)
    if not _same_bits(found, expected):
        raise CheckFailed(
            "computes something else than the source quantized at load",
            where=exported.path,
            got=f"logits that differ by up to {(expected - found).abs().max():.3g}",
        )


def _check_layers(exported: Checkpoint, model: Any, names: list[str], kind: Kind) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    made = {
        path: isinstance(module, Linear4bit if kind == "nf4" else Linear8bitLt)
        for path, module in model.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }
    layers = {layer_name(name) for name in names}
    if strange := sorted(made.keys() - layers):
        raise CheckFailed("is quantized once loaded", where=f"{exported.path}: {strange[0]}")
    if missed := sorted(layer for layer in layers if not made.get(layer)):
        raise CheckFailed(f"is not {kind} once loaded", where=f"{exported.path}: {missed[0]}")


def _check_weights(source: Checkpoint, exported: Checkpoint, model: Any, names: list[str]) -> None:
    import torch
    from bitsandbytes import functional

    nested = model.config.quantization_config.bnb_4bit_use_double_quant
    for name in names:
        loaded, dense = model.get_parameter(name), source.read(name)
        if loaded.dtype == torch.int8:
            codes, scales, _ = functional.int8_vectorwise_quant(dense.to(torch.float16))
            expected = functional.int8_vectorwise_dequant(codes, scales)
            found = functional.int8_vectorwise_dequant(loaded.data, loaded.SCB)
        else:
            codes, state = functional.quantize_4bit(
                dense, quant_type="nf4", compress_statistics=nested
            )
            expected = functional.dequantize_4bit(codes, state)
            found = functional.dequantize_4bit(loaded.data, loaded.quant_state)
        if not _same_bits(found, expected):
            raise CheckFailed("loads as another weight", where=f"{exported.path}: {name}")


def _quantized_by_transformers(source: Checkpoint, model: Any) -> Any:
    """The source as a model of the class and the `BitsAndBytesConfig` of ``model``.

    Its tensors are passed, not its directory, for a coded one states another quantization.
    """
    return type(model).from_pretrained(
        None,
        config=model_config(dense_config(source.config)),
        state_dict={name: source.read(name) for name in source.tensor_infos()},
        quantization_config=model.config.quantization_config,
        dtype="auto",
        device_map={"": "cpu"},
    )


def _check_tensors(exported: Checkpoint, model: Any, reference: Any) -> None:
    found, expected = model.state_dict(), reference.state_dict()
    for name in sorted(found.keys() | expected.keys()):
        both = name in found and name in expected
        if not both or not _same_bits(found[name], expected[name]):
            raise CheckFailed(
                "loads as another tensor than the source quantized at load",
                where=f"{exported.path}: {name}",
            )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (one, other))
    return torch.equal(left, right)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line of bitsandbytes' for every int8 layer whose inputs are not fp16."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _logits(model: Any) -> torch.Tensor:
    """The model's first output for a few tokens."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = (torch.arange(_PROOF[0] * _PROOF[1]) * 7 + 1).reshape(_PROOF) % vocabulary
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.inference_mode():
        return model(**inputs)[0].contiguous()
