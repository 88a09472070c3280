"""The stages a recipe can name. Importing this package makes them known."""

from __future__ import annotations

from compress.stages import cast, encode_weights, prune_blocks, prune_tokens, quantize
from compress.stages.base import (
    Calibration,
    CheckpointView,
    Decoded,
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
    "Decoded",
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
    "prune_tokens",
    "quantize",
    "register",
    "total_nbytes",
]
