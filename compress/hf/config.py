"""What a user may say of how a coded checkpoint is loaded, and what its config.json says of it.

`quantizer` registers it with transformers. Not this module: importing transformers' table of
quantizers makes `compress._autoload` import `quantizer`, which needs all that is in here.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from compress.checkpoint import QUANT_METHOD
from compress.errors import BadInput, did_you_mean
from compress.hf.packed import EXACT, FORMS
from compress.hf.quantized import COMPRESSED_TENSORS

CODED_QUANTIZED = f"{QUANT_METHOD}/{COMPRESSED_TENSORS}"
PLAIN = "decompress it first (`entropress decompress IN OUT`)"
_PACKED = ("auto", *FORMS)
_LOADING = ("skip", "tokens", "packed", "exact")  # what a user says, and no checkpoint


class EntropressConfig(QuantizationConfigMixin):
    """``quantization_config`` of an entropress checkpoint; its members are in docs/FORMAT.md.

    They are checked against the shards by `compress.checkpoint.open`, not here. The named ones are
    for `from_pretrained`, as in ``quantization_config=EntropressConfig(packed="auto")``:

    ``skip``: whether the model is loaded without what its config names as skipped
    (`compress.hf.skip_sublayers`). ``tokens``: whether prompts lose the tokens that its config says
    they may (`compress.tokens.attach_stored`).

    ``packed``: False, or how weights stay packed in memory (docs/PACKED.md): "stored" as in the
    file, for the CPU; "fast" or "dense", for GPUs; "auto" what suits the device. ``exact``: what is
    bit for bit that of the dense model: "logits", for which weights are unpacked in front of each
    product, or only "weights", which a GPU multiplies as they are packed, in another order of
    summation. Raises `BadInput` for other values and names.
    """

    def __init__(
        self,
        skip: bool = True,
        tokens: bool = True,
        packed: bool | str = False,
        exact: str = "logits",
        **members: Any,
    ) -> None:
        packed = "auto" if packed is True else packed
        if packed is not False:
            _check_known("packed", packed, _PACKED)
        _check_known("exact", exact, EXACT)
        if members and "quant_method" not in members:  # not a checkpoint's
            option = next(iter(members))
            raise BadInput(
                "EntropressConfig: unknown option",
                got=repr(option),
                mend=did_you_mean(option, _LOADING),
            )
        self.__dict__.update(members, skip=skip, tokens=tokens, packed=packed, exact=exact)
        self.quant_method = QUANT_METHOD

    @property
    def dequantize(self) -> bool:
        """Whether transformers is to drop every trace of quantization from the loaded model."""
        return not self.packed

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint's config.json says."""
        return {key: value for key, value in super().to_dict().items() if key not in _LOADING}

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
            raise BadInput("cannot be loaded coded", got=quantized.get("quant_method"), mend=PLAIN)
        config = CompressedTensorsConfig.from_dict(quantized, return_unused_kwargs, **kwargs)
        # By its method transformers finds the quantizer, which puts things right.
        made = config[0] if return_unused_kwargs else config
        made.quant_method = CODED_QUANTIZED
        made.stored_dtype = config_dict.get("dtype")
        return config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained` may be given beside what the checkpoint says."""
        return {name: getattr(self, name) for name in _LOADING}


def _check_known(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadInput(
            f"EntropressConfig: unknown {option}",
            got=repr(value),
            mend=did_you_mean(str(value), known),
        )
