"""Pruning: choose units, take them out of the checkpoint, heal, prove that the rest is the same."""

from __future__ import annotations

from compress.prune.accelerated import make_accelerator
from compress.prune.angular_window import window_angular
from compress.prune.blocks import check_drop
from compress.prune.budget import Budget
from compress.prune.distillation import Distillation, Distilled, distill
from compress.prune.evolution import Evolution, Evolved, evolve
from compress.prune.fitness import Removal, RemovalLoss, Unit
from compress.prune.heal import Healed, heal
from compress.prune.healing import apply_heal, fit_linear_heal
from compress.prune.healing_gaps import Unhealable
from compress.prune.healing_loss import healed_kl
from compress.prune.proof import check_pruned, output_without
from compress.prune.remembered import Remembered
from compress.prune.search import best_window, greedy, iterative, last_first, random_order
from compress.prune.selection import (
    PROPOSING,
    RULES,
    SEARCHES,
    Candidate,
    Searched,
    Selection,
    check_rules,
    select,
)
from compress.prune.settings import block_count, cut_config, model_config, stale_patterns
from compress.prune.sublayer_parts import sublayer_parts
from compress.prune.sublayer_surgery import drop_sublayers, skip_config, unit_tensors
from compress.prune.sublayers import Sublayer, Sublayers, find_sublayers
from compress.prune.surgery import BlockStack, find_stack, remove_blocks, stored_bytes
from compress.prune.units import KINDS, MEASURES, Units, find_units, gone_before, savings, without

__all__ = [
    "KINDS",
    "MEASURES",
    "PROPOSING",
    "RULES",
    "SEARCHES",
    "BlockStack",
    "Budget",
    "Candidate",
    "Distillation",
    "Distilled",
    "Evolution",
    "Evolved",
    "Healed",
    "Remembered",
    "Removal",
    "RemovalLoss",
    "Searched",
    "Selection",
    "Sublayer",
    "Sublayers",
    "Unhealable",
    "Unit",
    "Units",
    "apply_heal",
    "best_window",
    "block_count",
    "check_drop",
    "check_pruned",
    "check_rules",
    "cut_config",
    "distill",
    "drop_sublayers",
    "evolve",
    "find_stack",
    "find_sublayers",
    "find_units",
    "fit_linear_heal",
    "gone_before",
    "greedy",
    "heal",
    "healed_kl",
    "iterative",
    "last_first",
    "make_accelerator",
    "model_config",
    "output_without",
    "random_order",
    "remove_blocks",
    "savings",
    "select",
    "skip_config",
    "stale_patterns",
    "stored_bytes",
    "sublayer_parts",
    "unit_tensors",
    "window_angular",
    "without",
]
