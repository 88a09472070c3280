"""Pruning: choose blocks, take them out of the checkpoint, prove that the rest is unchanged."""

from __future__ import annotations

from compress.prune.blocks import check_drop, choose
from compress.prune.evolution import Evolution, Evolved, evolve
from compress.prune.fitness import Removal, RemovalLoss, Unit
from compress.prune.healing import apply_heal, fit_linear_heal
from compress.prune.proof import check_pruned, output_without
from compress.prune.scorers import leave_one_out, window_angular
from compress.prune.search import (
    best_window,
    greedy,
    iterative,
    keep_better,
    last_k,
    random_choice,
    removable,
)
from compress.prune.settings import block_count, cut_config, model_config, stale_patterns
from compress.prune.sublayer_parts import sublayer_parts
from compress.prune.sublayer_surgery import drop_sublayers, skip_config
from compress.prune.sublayers import (
    Sublayer,
    Sublayers,
    find_sublayers,
    output_without_sublayers,
    silenced,
)
from compress.prune.surgery import BlockStack, find_stack, remove_blocks

__all__ = [
    "BlockStack",
    "Evolution",
    "Evolved",
    "Removal",
    "RemovalLoss",
    "Sublayer",
    "Sublayers",
    "Unit",
    "apply_heal",
    "best_window",
    "block_count",
    "check_drop",
    "check_pruned",
    "choose",
    "cut_config",
    "drop_sublayers",
    "evolve",
    "find_stack",
    "find_sublayers",
    "fit_linear_heal",
    "greedy",
    "iterative",
    "keep_better",
    "last_k",
    "leave_one_out",
    "model_config",
    "output_without",
    "output_without_sublayers",
    "random_choice",
    "removable",
    "remove_blocks",
    "silenced",
    "skip_config",
    "stale_patterns",
    "sublayer_parts",
    "window_angular",
]
