"""NF4 and LLM.int8() weights as bitsandbytes stores them, which plain transformers loads.

NF4 (QLoRA, arXiv:2305.14314, section 3): 4-bit codes of a fixed table, scaled by the largest
magnitude of 64 weights, itself 8 bits wide with double quantization. LLM.int8() (arXiv:2208.07339,
section 3.1): 8-bit codes, scaled by that of a row, of the weight rounded to fp16. Codes and scales
come from bitsandbytes' own quantizers on the CPU, and are those that transformers makes as it loads
a dense checkpoint with a `BitsAndBytesConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import FLOATS, Checkpoint, NewTensor, TensorInfo, dense_config, rewrite
from compress.errors import BadInput, Missing
from compress.progress import SILENT, Progress
from compress.prune import model_config
from compress.quant.bnb_parts import Kind, bnb_layout, bnb_unfit, quantize_bnb
from compress.quant.export import layer_name
from compress.quant.layers import linear_names

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer


def export_bnb(
    checkpoint: Checkpoint,
    names: Iterable[str],
    kind: Kind,
    directory: Path,
    *,
    skipped: Mapping[str, str] | None = None,
    compute_dtype: torch.dtype | None = None,
    double_quant: bool = False,
    progress: Progress = SILENT,
) -> tuple[Checkpoint, dict[str, str]]:
    """Write the checkpoint with the weights ``names`` quantized by bitsandbytes.

    Weights are read and quantized one at a time. ``skipped``: the other linear weights, which the
    config names as such; None: all that `linear_names` knows. Of nf4: ``compute_dtype``, that the
    layers multiply in (None: that of the model), and ``double_quant``, scales of 8 bits. All else
    is kept as it is, a coded checkpoint decoded on the way.

    Returns the new checkpoint, and by its new tensors' names that of the weight they are of. Raises
    `BadInput` where nothing is to be quantized, the model is already, a weight cannot be
    (`bnb_unfit`), is skipped too, is not finite, could not be told from one that is skipped or is
    not stored in the dtype that the model is loaded in;
    `Missing` without bitsandbytes.
    """
    infos = checkpoint.tensor_infos()
    config = dense_config(checkpoint.config)
    if "quantization_config" in config:
        raise BadInput("is already quantized", where=checkpoint.path, mend="pass the original")
    if kind == "int8" and (double_quant or compute_dtype is not None):
        raise BadInput("int8 knows neither double_quant nor compute_dtype")
    chosen = list(dict.fromkeys(names))
    if not chosen:
        raise BadInput("has no weight to quantize", where=checkpoint.path)
    _require()
    if skipped is None:
        linears = linear_names(checkpoint)
        left = [name for name in linears.weights if name not in chosen]
        skipped = linears.skipped | dict.fromkeys(left, "")
    _check_names(infos, chosen, skipped, kind)
    skip = [layer_name(name) for name in skipped if name.endswith(".weight")]
    _check_skipping(config, chosen, skip)
    dtype = _dtype(checkpoint, chosen)
    config.setdefault("dtype", str(dtype).removeprefix("torch."))  # or a scale's would be taken
    config["quantization_config"] = _config(kind, skip, compute_dtype or dtype, double_quant)
    parts = {name: bnb_layout(infos[name], kind, double_quant) for name in chosen}

    @lru_cache(maxsize=1)
    def made(name: str) -> dict[str, torch.Tensor]:
        return quantize_bnb(checkpoint.read(name), name, kind, double_quant)

    def taken(name: str, part: str) -> Iterator[Buffer]:
        yield _bytes(made(name)[part])

    def transform(info: TensorInfo) -> Iterator[NewTensor]:
        if info.name not in parts:
            yield NewTensor(info.name, info.dtype, info.shape, checkpoint.chunks(info.name))
            return
        for part, (stored, shape) in parts[info.name].items():
            yield NewTensor(part, stored, shape, taken(info.name, part))

    done, _ = rewrite(
        checkpoint,
        directory,
        transform,
        config=config,
        metadata={"format": "pt"} if checkpoint.coded else None,
        progress=progress,
        label="quantizing",
    )
    return done, {part: name for name in parts for part in parts[name]}


def _dtype(checkpoint: Checkpoint, names: list[str]) -> torch.dtype:
    """The one dtype that the weights are stored and the model is loaded in.

    Of a quantized checkpoint transformers 5.23 casts no weight, not even those that are not.
    """
    import torch

    stated = model_config(dense_config(checkpoint.config)).dtype
    infos = checkpoint.tensor_infos()
    found = {getattr(torch, FLOATS[infos[name].dtype]) for name in names}
    if len(found) > 1 or stated not in (None, *found):
        raise BadInput(
            "its linear layers are not all stored in the dtype that the model is loaded in",
            where=checkpoint.path,
            got=", ".join(sorted(str(dtype) for dtype in found)),
            expected=stated,
            mend="set model.dtype in the recipe",
        )
    [dtype] = found
    return dtype


def _require() -> None:
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise Missing(
            "bitsandbytes is not installed", mend="run: pip install bitsandbytes accelerate"
        ) from None


def _check_names(
    infos: Mapping[str, TensorInfo], names: list[str], skipped: Mapping[str, str], kind: Kind
) -> None:
    for name in names:
        if name in skipped:
            raise BadInput("is to be quantized and skipped", where=name, got=skipped[name] or None)
        if name not in infos:
            raise BadInput("is not the weight of a linear layer", where=name)
        if reason := bnb_unfit(infos[name], kind):
            raise BadInput(reason, where=name, mend="leave this layer out")


def _check_skipping(config: Mapping[str, Any], names: list[str], skip: list[str]) -> None:
    """Refuse what transformers would skip too, for it compares names as patterns and as endings."""
    import transformers
    from transformers.quantizers.quantizers_utils import should_convert_module

    architecture = (config.get("architectures") or [""])[0]
    wide = getattr(getattr(transformers, architecture, None), "_keep_in_fp32_modules", None)
    for pattern in (*skip, *(wide or ())):
        for name in names:
            if not should_convert_module(layer_name(name), [pattern]):
                raise BadInput(
                    f"transformers would skip it with '{pattern}'",
                    where=name,
                    mend="leave this layer out",
                )


def _config(
    kind: Kind, skip: list[str], compute_dtype: torch.dtype, double_quant: bool
) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        stated = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        stated = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_use_double_quant=double_quant,
            llm_int8_skip_modules=skip,
        )
    return stated.to_dict()


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
