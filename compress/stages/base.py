"""What a stage is: a checkpoint in, a checkpoint and a report out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.checkpoint import Checkpoint, TensorInfo, dense_config
from compress.progress import SILENT, Progress
from compress.registry import Registry

if TYPE_CHECKING:
    from typing_extensions import Buffer


class StageConfig(BaseModel):
    """Base of every stage's and gate's options: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(StageConfig):
    """The text a stage may look at: ``sequences`` windows of ``length`` tokens.

    A ``~`` that leads ``data`` is expanded here, once, so that everybody means the same file.
    """

    data: str = "builtin:calibration"
    sequences: int = Field(default=32, ge=1)
    length: int = Field(default=512, ge=8)
    seed: int = 0

    @field_validator("data")
    @classmethod
    def _expand_home(cls, data: str) -> str:
        return os.path.expanduser(data)  # noqa: PTH111  a Path would rewrite the rest as well


class CheckpointView(Protocol):
    """What a plan looks at: a `Checkpoint`, or what an earlier stage will make of one."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def coded(self) -> bool: ...

    def tensor_infos(self) -> dict[str, TensorInfo]: ...

    def chunks(self, name: str) -> Iterator[Buffer]: ...


@dataclass(frozen=True)
class Decoded:
    """What a coded checkpoint is for the stage after one that writes it dense."""

    source: CheckpointView
    coded: bool = False

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def config(self) -> dict[str, Any]:
        return dense_config(self.source.config)

    def tensor_infos(self) -> dict[str, TensorInfo]:
        return self.source.tensor_infos()

    def chunks(self, name: str) -> Iterator[Buffer]:
        return self.source.chunks(name)


@dataclass(frozen=True)
class Estimate:
    """What a stage expects to do, found cheaply.

    ``nbytes``: size of the tensors afterwards; ``changes``: one line each, for people; ``outcome``:
    what later stages are to plan on, from a stage that knows it without writing.
    """

    nbytes: int
    changes: list[str] = field(default_factory=list)
    outcome: CheckpointView | None = None


class StageReport(BaseModel):
    """What a stage did. Holds nothing that differs between two runs on the same input.

    ``renamed`` maps a new tensor name to its old one; ``removed`` lists old names that are gone,
    ``changed`` new names whose values are other ones.
    ``tensors``: by name the dtype, shape and sha256 of each tensor's decoded bytes, from a stage
    that saw them pass; kept in the manifest's own member, not with the report.
    """

    stage: str
    config: dict[str, Any]
    summary: str
    metrics: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    removed: list[str] = []
    changed: list[str] = []
    tensors: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Workspace:
    """Where and with what a stage works.

    ``directory`` is the stage's own output directory; what an interrupted run finished there may be
    reused, since its name is a digest of the stage's input and configuration. ``scratch``, if any,
    is kept as long as the stage is not done: for what a resumed run need not do again.
    """

    directory: Path
    calibration: Calibration = Calibration()
    progress: Progress = SILENT
    threads: int | None = None
    scratch: Path | None = None


class Stage(Protocol):
    """A step of a recipe. Stages hold no state: they know the checkpoint and their config."""

    name: ClassVar[str]
    Config: ClassVar[type[StageConfig]]
    lossless: ClassVar[bool]

    def plan(
        self, checkpoint: CheckpointView, config: Any, calibration: Calibration, exact: bool = True
    ) -> Estimate:
        """Check that the stage can run and say what it would do, without writing anything.

        Not ``exact``: no tensor is read, and sizes may be bounds from above.
        """

    def run(
        self, checkpoint: Checkpoint, config: Any, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Write a complete checkpoint into ``workspace.directory`` and report on it."""


def total_nbytes(checkpoint: CheckpointView) -> int:
    """The size of all tensors, decoded."""
    return sum(info.nbytes for info in checkpoint.tensor_infos().values())


_STAGES: Registry[Stage] = Registry("stage")
register, get, names = _STAGES.register, _STAGES.get, _STAGES.names
