"""Fewer tokens: prompts that lose what says least before most of a model's layers."""

from __future__ import annotations

from compress.tokens.budget import KeepBudget
from compress.tokens.choice import token_losses
from compress.tokens.collapse import collapse_layer, layer_entropies, segment_by_entropy
from compress.tokens.engine import attach, attached, detach, last_report, pruning, switched_off
from compress.tokens.families import find_family
from compress.tokens.fit import check_family, count_tokens
from compress.tokens.flops import predicted_flops, prompt_cost
from compress.tokens.policy import TokenPolicy
from compress.tokens.segment import KeptSegment, PrefillReport, Segment, Selector
from compress.tokens.selectors import SELECTORS, make_selector
from compress.tokens.stored import attach_if_stored, attach_stored, stored_policy

__all__ = [
    "SELECTORS",
    "KeepBudget",
    "KeptSegment",
    "PrefillReport",
    "Segment",
    "Selector",
    "TokenPolicy",
    "attach",
    "attach_if_stored",
    "attach_stored",
    "attached",
    "check_family",
    "collapse_layer",
    "count_tokens",
    "detach",
    "find_family",
    "last_report",
    "layer_entropies",
    "make_selector",
    "predicted_flops",
    "prompt_cost",
    "pruning",
    "segment_by_entropy",
    "stored_policy",
    "switched_off",
    "token_losses",
]
