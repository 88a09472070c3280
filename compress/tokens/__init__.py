"""Fewer tokens: prompts that lose what says least before most of a model's layers."""

from __future__ import annotations

from compress.tokens.budget import KeepBudget
from compress.tokens.cache import attach_cache, cache_report, compressing, detach_cache
from compress.tokens.cache_budget import pyramid
from compress.tokens.cache_calibration import (
    calibrate_cache,
    high_heads,
    query_entropies,
    uncomp_shares,
)
from compress.tokens.cache_hooks import CacheEngine
from compress.tokens.cache_policy import CachePolicy
from compress.tokens.cache_prompt import CacheReport
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
    "CacheEngine",
    "CachePolicy",
    "CacheReport",
    "KeepBudget",
    "KeptSegment",
    "PrefillReport",
    "Segment",
    "Selector",
    "TokenPolicy",
    "attach",
    "attach_cache",
    "attach_if_stored",
    "attach_stored",
    "attached",
    "cache_report",
    "calibrate_cache",
    "check_family",
    "collapse_layer",
    "compressing",
    "count_tokens",
    "detach",
    "detach_cache",
    "find_family",
    "high_heads",
    "last_report",
    "layer_entropies",
    "make_selector",
    "predicted_flops",
    "prompt_cost",
    "pruning",
    "pyramid",
    "query_entropies",
    "segment_by_entropy",
    "stored_policy",
    "switched_off",
    "token_losses",
    "uncomp_shares",
]
