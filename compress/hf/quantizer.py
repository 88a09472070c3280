"""Decode at load: ``from_pretrained`` of an entropress checkpoint gives an ordinary dense model.

transformers' loader takes a state dict in place of checkpoint files. The quantizer hands it one
whose tensors are decoded when their values are asked for, so renaming, merging of experts, casting
and placement, written for dense checkpoints, apply as they are. So does what loads checkpoints of
compressed-tensors, where it was one of those that was coded. Importing this module registers it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import (
    CompressedTensorsConfig,
    QuantizationConfigMixin,
    QuantizationMethod,
)

from compress import checkpoint
from compress.checkpoint import QUANT_METHOD, Checkpoint
from compress.errors import BadInput, Corrupt
from compress.hf.quantized import COMPRESSED_TENSORS

_CODED_QUANTIZED = f"{QUANT_METHOD}/{COMPRESSED_TENSORS}"
_PLAIN = "decompress it first (`entropress decompress IN OUT`)"


@register_quantization_config(QUANT_METHOD)
class EntropressConfig(QuantizationConfigMixin):
    """``quantization_config`` of an entropress checkpoint; its members are in docs/FORMAT.md.

    They are checked against the shards by `compress.checkpoint.open`, not here. ``skip`` is for
    `from_pretrained`: whether the model is loaded without what its config names as skipped
    (`compress.hf.skip_sublayers`); ``quantization_config=EntropressConfig(skip=False)`` loads it
    whole. ``tokens`` likewise: whether prompts lose the tokens that its config says they may
    (`compress.tokens.attach_stored`).
    """

    dequantize = True  # makes transformers drop every trace of quantization from the loaded model

    def __init__(self, skip: bool = True, tokens: bool = True, **members: Any) -> None:
        self.__dict__.update(members, skip=skip, tokens=tokens, quant_method=QUANT_METHOD)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers asks; of a model quantized before it was coded, that config of its own.

        So the same may be passed to `from_pretrained` as for the checkpoint before it was coded.
        """
        quantized = config_dict.get("quantization_config")
        if quantized is None:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        if quantized.get("quant_method") != COMPRESSED_TENSORS:
            raise BadInput("cannot be loaded coded", got=quantized.get("quant_method"), mend=_PLAIN)
        config = CompressedTensorsConfig.from_dict(quantized, return_unused_kwargs, **kwargs)
        # By its method transformers finds the quantizer, which puts things right.
        made = config[0] if return_unused_kwargs else config
        made.quant_method = _CODED_QUANTIZED
        made.stored_dtype = config_dict.get("dtype")
        return config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained` may be given beside what the checkpoint says."""
        return {"skip": self.skip, "tokens": self.tokens}


# Of other classes transformers ignores the given config.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (EntropressConfig,)


class _DecodingQuantizer(HfQuantizer):
    """Checks the checkpoint before the model is filled and decodes it on the way in.

    Raises `Corrupt` naming file and tensor when any stored byte is not what was written, `BadInput`
    for a checkpoint that needs a newer reader and for tensor-parallel loading.
    """

    stored_dtype: str | None = None
    _checkpoint: Checkpoint | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Mend ``dtype="auto"``: without a dtype in config.json it finds the coded bytes' uint8."""
        if dtype.is_floating_point:
            return dtype
        stored = getattr(torch, str(self.stored_dtype), None)
        if not isinstance(stored, torch.dtype) or not stored.is_floating_point:
            raise BadInput(
                "config.json names no dtype",
                mend="pass one, as in from_pretrained(dtype='float32')",
            )
        return stored

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if checkpoint_files:
            _decode_for_loader()
            self._checkpoint = _checked(checkpoint_files)
        return super()._process_model_before_weight_loading(model, **kwargs)

    def state_dict(self) -> dict[str, _CodedTensor] | None:
        """All tensors, undecoded, to the first caller; None to later ones, who load adapters."""
        coded, self._checkpoint = self._checkpoint, None
        if coded is None:
            return None
        return {name: _CodedTensor(coded, name) for name in coded.tensor_infos()}


@register_quantizer(QUANT_METHOD)
class EntropressQuantizer(_DecodingQuantizer):
    """Gives the ordinary dense model, without what its config names as skipped."""

    def __init__(self, quantization_config: EntropressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored_dtype = getattr(quantization_config, "dtype", None)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise BadInput(
                "an EntropressConfig does not code a dense model",
                mend="run `entropress compress --recipe lossless.yaml` on its checkpoint",
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Cast as for a dense checkpoint, integers too."""
        return dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Not above: transformers is still being imported when this module is.
        from compress.hf.skipping import skip_if_possible
        from compress.tokens import attach_if_stored

        if self.quantization_config.skip:
            skip_if_possible(model)
        return attach_if_stored(model) if self.quantization_config.tokens else model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@register_quantizer(_CODED_QUANTIZED)
class CodedCompressedTensorsQuantizer(_DecodingQuantizer, CompressedTensorsHfQuantizer):
    """Gives the model that transformers makes of the compressed-tensors checkpoint that was coded.

    Its config is that checkpoint's own, and so is what `save_pretrained` writes.
    """

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        self.stored_dtype = quantization_config.__dict__.pop("stored_dtype")
        quantization_config.quant_method = QuantizationMethod.COMPRESSED_TENSORS
        super().__init__(quantization_config, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from compress.tokens import attach_if_stored

        done = super()._process_model_after_weight_loading(model, **kwargs)
        return attach_if_stored(model if done is None else done)


class _CodedTensor:
    """A tensor that is read and decoded when indexed, as the slices of safetensors are read."""

    def __init__(self, source: Checkpoint, name: str) -> None:
        self._source = source
        self._name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._source.read(self._name)[index]

    def get_dtype(self) -> str:
        """As safetensors spells it."""
        return self._source.tensor_infos()[self._name].dtype


def _checked(checkpoint_files: list[str]) -> Checkpoint:
    """The checkpoint those files make up, every header checked."""
    directory = Path(checkpoint_files[0]).parent
    coded = checkpoint.open(directory)
    if not coded.coded:
        raise Corrupt(f"config.json does not call it {QUANT_METHOD}-coded", where=directory)
    given = sorted(Path(file).name for file in checkpoint_files)
    if given != sorted(coded.files):
        raise Corrupt("its shards are not the files to load", where=directory, got=", ".join(given))
    coded.tensor_infos()
    # Downloads of single files come without a manifest; one that is there must be whole.
    _ = coded.manifest
    return coded


@functools.cache
def _decode_for_loader() -> None:
    """Make transformers' loader ask our quantizer, and no other, for the state dict.

    5.23 has that hook for GGUF alone, so the one function that takes both is wrapped. Should a
    later release rename it, loading fails: coded tensors have no parameter's shape.
    """
    from transformers import PreTrainedModel

    load = PreTrainedModel._load_pretrained_model

    @functools.wraps(load)
    def load_decoded(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kw: Any
    ) -> Any:
        quantizer = load_config.hf_quantizer
        decoded = quantizer.state_dict() if isinstance(quantizer, _DecodingQuantizer) else None
        if decoded is not None:
            if load_config.device_mesh is not None:
                raise BadInput(
                    "cannot be loaded in tensor-parallel shards",
                    where=load_config.pretrained_model_name_or_path,
                    mend=_PLAIN,
                )
            state_dict, checkpoint_files = decoded, None
        return load(model, state_dict, checkpoint_files, load_config, *args, **kw)

    PreTrainedModel._load_pretrained_model = staticmethod(load_decoded)
