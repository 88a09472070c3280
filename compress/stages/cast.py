"""`cast`: floating-point weights rounded to another floating-point dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.checkpoint import FLOATS, Checkpoint, NewTensor, TensorInfo, dense_config, rewrite
from compress.errors import BadInput
from compress.stages.base import (
    Calibration,
    CheckpointView,
    Estimate,
    StageConfig,
    StageReport,
    Workspace,
    register,
    total_nbytes,
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
        checkpoint: CheckpointView,
        config: CastConfig,
        calibration: Calibration,
        exact: bool = True,
    ) -> Estimate:
        """The exact size. Raises `BadInput` for a checkpoint that is coded or quantized."""
        if checkpoint.coded or "quantization_config" in dense_config(checkpoint.config):
            raise BadInput("coded or quantized weights cannot be cast", where=checkpoint.path)
        rounded = Rounded(checkpoint, config.dtype)
        change = f"floating-point weights become {config.dtype}"
        return Estimate(total_nbytes(rounded), [change], rounded)

    def run(
        self, checkpoint: Checkpoint, config: CastConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Write what `Rounded` gives. Raises `BadInput` for a weight too large for the dtype."""
        rounded = Rounded(checkpoint, config.dtype)

        def cast(info: TensorInfo) -> Iterator[NewTensor]:
            new = rounded.tensor_infos()[info.name]
            yield NewTensor(new.name, new.dtype, new.shape, rounded.chunks(new.name))

        done, _ = rewrite(
            checkpoint,
            workspace.directory,
            cast,
            config=rounded.config,
            progress=workspace.progress,
            label="casting",
        )
        before, after = total_nbytes(checkpoint), total_nbytes(done)
        report = StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=f"weights rounded to {config.dtype}, {before:,} → {after:,} bytes",
            metrics={"bytes_in": before, "bytes_out": after},
        )
        return done, report


class Rounded:
    """A checkpoint as it is after the cast to ``dtype``, rounded as it is read."""

    coded = False

    def __init__(self, source: CheckpointView, dtype: str) -> None:
        self.path: Path = source.path
        self.config = _with_dtype(source.config, dtype)
        self._source = source
        self._dtype = dtype

    def tensor_infos(self) -> dict[str, TensorInfo]:
        return self._infos

    def chunks(self, name: str) -> Iterator[Buffer]:
        """As `Checkpoint.chunks`; `BadInput` where a finite weight would become infinite."""
        before, after = self._source.tensor_infos()[name], self._infos[name]
        chunks = self._source.chunks(name)
        return chunks if before.dtype == after.dtype else _round(before, chunks, self._dtype)

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        infos = self._source.tensor_infos()
        return {name: _after(info, _STORED[self._dtype]) for name, info in infos.items()}


def _after(info: TensorInfo, target: str) -> TensorInfo:
    if info.dtype not in FLOATS:
        return info
    nbytes = info.nbytes // _BYTES[info.dtype] * _BYTES[target]
    return replace(info, dtype=target, nbytes=nbytes, stored_nbytes=nbytes)


def _round(info: TensorInfo, chunks: Iterable[Buffer], target: str) -> Iterator[Buffer]:
    import torch

    overflow = 0.0  # the largest magnitude that became infinite; the tensor's largest is among them
    for chunk in chunks:
        values = torch.frombuffer(bytearray(chunk), dtype=getattr(torch, FLOATS[info.dtype]))
        rounded = values.to(getattr(torch, target))
        lost = values[rounded.isinf() & values.isfinite()]
        if len(lost):
            overflow = max(overflow, lost.abs().max().item())
        yield memoryview(rounded.view(torch.uint8).numpy())
    if overflow:
        raise BadInput(
            f"has weights too large for {target}",
            where=f"{info.file}: {info.name}",
            got=f"a magnitude of {overflow:g}",
            expected=f"at most {torch.finfo(getattr(torch, target)).max:g}",
            mend="choose bfloat16" if target == "float16" else "keep the dtype it has",
        )


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
