"""Decode at load: ``from_pretrained`` of an entropress checkpoint gives an ordinary dense model.

Or, where the user asks for it, one whose weights stay packed in memory (`compress.hf.packed`).

transformers' loader takes a state dict in place of checkpoint files. The quantizer hands it one
whose tensors are decoded when their values are asked for, so renaming, merging of experts, casting
and placement, written for dense checkpoints, apply as they are. So does what loads checkpoints of
compressed-tensors, where it was one of those that was coded. Importing this module registers it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationMethod

from compress import checkpoint
from compress.checkpoint import QUANT_METHOD, Checkpoint
from compress.errors import BadInput, Corrupt
from compress.hf.config import CODED_QUANTIZED, PLAIN, EntropressConfig

if TYPE_CHECKING:
    from compress.hf.packed.loading import Packer

register_quantization_config(QUANT_METHOD)(EntropressConfig)
# Of other classes transformers ignores the given config.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (EntropressConfig,)


class _DecodingQuantizer(HfQuantizer):
    """Checks the checkpoint before the model is filled and decodes it on the way in.

    Raises `Corrupt` naming file and tensor when any stored byte is not what was written, `BadInput`
    for a checkpoint that needs a newer reader and for tensor-parallel loading.
    """

    stored_dtype: str | None = None
    files: MutableMapping[torch.Tensor, CodedTensor] | None = None
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

    def state_dict(self) -> dict[str, CodedTensor] | None:
        """All tensors, undecoded, to the first caller; None to later ones, who load adapters."""
        coded, self._checkpoint = self._checkpoint, None
        if coded is None:
            return None
        return {name: CodedTensor(coded, name, self.files) for name in coded.tensor_infos()}

    @contextmanager
    def loading(self, model: Any, device_map: dict[str, Any] | None) -> Iterator[None]:
        """Around transformers' loader."""
        yield


@register_quantizer(QUANT_METHOD)
class EntropressQuantizer(_DecodingQuantizer):
    """Gives the ordinary dense model, without what its config names as skipped, or a packed one."""

    is_compileable = True
    _dtype: torch.dtype  # known when `update_dtype` has run
    _packer: Packer | None = None
    _conversions: list[Any] | None = None

    def __init__(self, quantization_config: EntropressConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored_dtype = getattr(quantization_config, "dtype", None)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise BadInput(
                "an EntropressConfig does not code a dense model",
                mend="run `entropress compress --recipe lossless.yaml` on its checkpoint",
            )
        if self.quantization_config.packed and isinstance(device_map, dict):
            from compress.hf.packed.loading import check_devices

            check_devices(device_map, self.quantization_config.packed)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self._dtype = super().update_dtype(dtype)
        if self.quantization_config.packed:
            from compress.hf.packed.loading import check_dtype

            check_dtype(self._dtype)
        return self._dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """Cast as for a dense checkpoint, integers too."""
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        config = self.quantization_config
        if config.packed:
            from compress.hf.packed.loading import Packer

            self._packer = Packer(model, self._dtype, config.packed, config.exact, config.skip)
            self.files = self._packer.files
        return super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._packer is not None and param_name in self._packer.waiting

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        if self._packer is None:
            return param.element_size()
        return self._packer.element_size(param_name, param)

    def get_quantize_ops(self) -> Packer | None:
        return self._packer

    @contextmanager
    def loading(self, model: Any, device_map: dict[str, Any] | None) -> Iterator[None]:
        """Make transformers' loader run the packer, one tensor after the other."""
        if self._packer is None:
            yield
            return
        from compress.hf.packed.loading import check_ties

        check_ties(model, device_map)
        self.pre_quantized = False  # what is quantized on the way in is not, to the loader
        try:
            with self._packer.stopping():
                yield
        finally:
            self.pre_quantized = True
        self._packer.share_equal(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Not above: transformers is still being imported when this module is.
        from compress.hf.skipping import skip_if_possible
        from compress.tokens import attach_if_stored

        if self._packer is not None:
            self._packer.install(model)
            self._packer = self.files = None
        if self.quantization_config.skip:
            skip_if_possible(model)
        return attach_if_stored(model) if self.quantization_config.tokens else model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        """What `save_pretrained` writes: of adapters what it would, of the model coded tensors."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        from compress.hf.packed.saving import coded_state_dict

        if self._conversions is None:
            # They are reverted here, and by `save_pretrained` no more.
            self._conversions, model._weight_conversions = model._weight_conversions, []
        state, members = coded_state_dict(model, self._conversions)
        vars(model.config.quantization_config).update(members)
        return state, {QUANT_METHOD: str(members["format_version"])}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        raise BadInput(
            "a packed model is not unpacked in place",
            mend="load it without EntropressConfig(packed=...)",
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@register_quantizer(CODED_QUANTIZED)
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


class CodedTensor:
    """A tensor that is read and decoded when indexed, as the slices of safetensors are read.

    ``files``: where to put itself down by the tensor that it gives.
    """

    def __init__(self, source: Checkpoint, name: str, files: Any) -> None:
        self._source = source
        self._name = name
        self._files = files

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._source.read(self._name)[index]
        if self._files is not None and index is Ellipsis:
            self._files[tensor] = self
        return tensor

    def get_dtype(self) -> str:
        """As safetensors spells it."""
        return self._source.tensor_infos()[self._name].dtype

    @property
    def stored_nbytes(self) -> int:
        return self._source.tensor_infos()[self._name].stored_nbytes

    def stored(self) -> torch.Tensor:
        """Its bytes as they are in the file, 1-D uint8."""
        file, offset, nbytes = self._source.stored(self._name)
        data = np.fromfile(self._source.path / file, np.uint8, nbytes, offset=offset)
        return torch.from_numpy(data)


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
                    mend=PLAIN,
                )
            with quantizer.loading(model, load_config.device_map):
                return load(model, decoded, None, load_config, *args, **kw)
        return load(model, state_dict, checkpoint_files, load_config, *args, **kw)

    PreTrainedModel._load_pretrained_model = staticmethod(load_decoded)
