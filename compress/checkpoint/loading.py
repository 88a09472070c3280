"""From a checkpoint to objects of torch and transformers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.consistency import coding
from compress.checkpoint.layout import DF11, TOKENS
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    import torch

# Dtypes that weights are computed in, by the names of safetensors and of torch.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_TORCH_NAMES = {
    **FLOATS,
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def torch_layout(
    dtype: str, shape: tuple[int, ...], where: object
) -> tuple[torch.dtype, tuple[int, ...]]:
    """torch's dtype and shape for a safetensors dtype and shape.

    torch packs two ``F4`` into one element, so the last dimension halves. Raises `BadInput` where
    torch has no such dtype.
    """
    import torch

    if dtype not in _TORCH_NAMES:
        raise BadInput(f"torch has no dtype for {dtype}", where=where)
    if dtype == "F4" and shape:
        if shape[-1] % 2:
            raise BadInput("torch packs F4 in pairs", where=where, got=f"{shape[-1]} of them")
        shape = (*shape[:-1], shape[-1] // 2)
    return getattr(torch, _TORCH_NAMES[dtype]), shape


def load_model(
    directory: Path,
    config: dict[str, Any],
    dtype: Any,
    device: Any,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Any:
    """The model that ``config['architectures']`` names, else the base model, in eval mode.

    Whole: what the config names as skipped is computed, as every other reader does it
    (`compress.hf.skip_sublayers` takes it out), and no tokens are pruned (`compress.tokens`).
    ``dtype``: a torch dtype or its name, or "auto" for the stored one. ``device``: a torch device,
    or "auto" for all CUDA devices as accelerate fills them, or the CPU where there are none.
    ``tensors``: the weights by name, in place of what the directory's files hold. Raises `Corrupt`
    when weights are missing, left over or of a wrong shape (tied weights need not be stored),
    `BadInput` when transformers does not know the architecture.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, GenerationConfig

    spread = device == "auto" and torch.cuda.is_available()
    try:
        settings = AutoConfig.from_pretrained(directory, local_files_only=True)
        if coding(config) is not None:
            settings.quantization_config["skip"] = False
        # Loaders of coded checkpoints would follow it.
        policy = settings.__dict__.pop(TOKENS, None)
        settings.__dict__.pop(DF11, None)
        model, info = model_class(config).from_pretrained(
            directory if tensors is None else None,
            config=settings,
            state_dict=tensors,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            device_map="auto" if spread else None,
            ignore_mismatched_sizes=True,  # to report them below rather than by a traceback
        )
        if policy is not None:
            setattr(model.config, TOKENS, policy)
        if tensors is not None and model.can_generate():  # the loader was not told where to look
            with suppress(OSError):
                model.generation_config = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise BadInput(f"transformers cannot load it: {said}", where=directory) from error
    for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[keys])):
            raise Corrupt(
                f"weights do not fit the architecture: {len(names)} {keys.replace('_', ' ')}",
                where=directory,
                got=names[0],
            )
    _unpack(model)
    if not spread:
        model = model.to("cpu" if device == "auto" else device)
    return model.eval()


def _unpack(model: Any) -> None:
    """Make dense weights of the codes of compressed-tensors.

    A hook of its own would do so at the first pass through the whole model; ours run parts of it.
    """
    for hook in list(model._forward_pre_hooks.values()):
        if getattr(hook, "__name__", "") == "ct_decompress_hook":
            hook(model, ())


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory; `BadInput` where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"no tokenizer: {error}", where=directory) from error


def model_class(config: dict[str, Any]) -> Any:
    """The class by its name, so that heads are neither missing nor left over."""
    import transformers

    names = config.get("architectures")
    named = (
        getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    )
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    return transformers.AutoModel
