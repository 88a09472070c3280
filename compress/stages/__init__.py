"""The stages a recipe can name. Importing this package makes them known."""

from __future__ import annotations

from compress.stages import cast, encode_weights, prune_blocks
from compress.stages.base import (
    Calibration,
    CheckpointView,
    Estimate,
    Stage,
    StageConfig,
    StageReport,
    Workspace,
    get,
    names,
    register,
    total_nbytes,
)

__all__ = [
    "Calibration",
    "CheckpointView",
    "Estimate",
    "Stage",
    "StageConfig",
    "StageReport",
    "Workspace",
    "cast",
    "encode_weights",
    "get",
    "names",
    "prune_blocks",
    "register",
    "total_nbytes",
]
