"""Pruning: choose blocks, take them out of the checkpoint, prove that the rest is unchanged."""

from __future__ import annotations

from compress.prune.blocks import check_drop, choose
from compress.prune.proof import check_pruned, output_without
from compress.prune.settings import block_count, cut_config, model_config, stale_patterns
from compress.prune.surgery import BlockStack, find_stack, remove_blocks

__all__ = [
    "BlockStack",
    "block_count",
    "check_drop",
    "check_pruned",
    "choose",
    "cut_config",
    "find_stack",
    "model_config",
    "output_without",
    "remove_blocks",
    "stale_patterns",
]
