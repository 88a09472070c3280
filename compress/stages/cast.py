"""`cast`: floating-point weights rounded to another floating-point dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.checkpoint import FLOATS, Checkpoint, NewTensor, TensorInfo, rewrite
from compress.errors import BadInput
from compress.stages.base import (
    Calibration,
    Estimate,
    StageConfig,
    StageReport,
    Workspace,
    register,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STORED = {name: dtype for dtype, name in FLOATS.items()}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class CastConfig(StageConfig):
    """What to round to."""

    dtype: Literal["float32", "float16", "bfloat16"]


@register
class Cast:
    """Round to nearest even; tensors of integers and of 8-bit floats stay as they are."""

    name: ClassVar[str] = "cast"
    Config: ClassVar[type[StageConfig]] = CastConfig
    lossless: ClassVar[bool] = False

    def plan(
        self,
        checkpoint: Checkpoint,
        config: CastConfig,
        calibration: Calibration,
        exact: bool = True,
    ) -> Estimate:
        """The exact size. Raises `BadInput` for a checkpoint that is coded or quantized."""
        if "quantization_config" in checkpoint.config:
            raise BadInput("coded or quantized weights cannot be cast", where=checkpoint.path)
        infos = checkpoint.tensor_infos().values()
        nbytes = sum(_nbytes(info, _STORED[config.dtype]) for info in infos)
        return Estimate(nbytes, [f"floating-point weights become {config.dtype}"])

    def run(
        self, checkpoint: Checkpoint, config: CastConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        target = _STORED[config.dtype]

        def cast(info: TensorInfo) -> Iterator[NewTensor]:
            chunks: Iterable[Buffer] = checkpoint.chunks(info.name)
            dtype = info.dtype
            if dtype in FLOATS and dtype != target:
                chunks, dtype = _round(chunks, dtype, config.dtype), target
            yield NewTensor(info.name, dtype, info.shape, chunks)

        done, _ = rewrite(
            checkpoint,
            workspace.directory,
            cast,
            config=_with_dtype(checkpoint.config, config.dtype),
            progress=workspace.progress,
            label="casting",
        )
        before, after = (
            sum(info.nbytes for info in side.tensor_infos().values()) for side in (checkpoint, done)
        )
        report = StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=f"weights rounded to {config.dtype}, {before:,} → {after:,} bytes",
            metrics={"bytes_in": before, "bytes_out": after},
        )
        return done, report


def _nbytes(info: TensorInfo, target: str) -> int:
    if info.dtype not in FLOATS:
        return info.nbytes
    return info.nbytes // _BYTES[info.dtype] * _BYTES[target]


def _round(chunks: Iterable[Buffer], dtype: str, target: str) -> Iterator[Buffer]:
    import torch

    for chunk in chunks:
        values = torch.frombuffer(bytearray(chunk), dtype=getattr(torch, FLOATS[dtype]))
        yield memoryview(values.to(getattr(torch, target)).view(torch.uint8).numpy())


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every ``dtype`` it states, also those of nested configs, replaced."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
