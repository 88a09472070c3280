"""Prompts lose keys and values after they were read: smaller caches for unmodified models.

After UNComp (arXiv 2410.03090) and SnapKV (arXiv 2404.14469): a prompt is computed whole; then each
layer of the cache keeps, head by head, the tokens that seem worth it, and later tokens see these
alone, at their old positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.tokens.cache_hooks import CacheEngine, cache_engine_of
from compress.tokens.cache_policy import CachePolicy
from compress.tokens.cache_prompt import CacheReport
from compress.tokens.families import VISUAL, Family, find_attention, find_family
from compress.tokens.hooks import engine_of
from compress.tokens.policy import TokenPolicy

if TYPE_CHECKING:
    import torch


@contextmanager
def compressing(model: Any, policy: CachePolicy) -> Iterator[CacheEngine]:
    """Inside of the block, ``model`` compresses the caches that it fills, as ``policy`` says.

    A forward with more than ``window + sinks`` tokens of a row (padding left out) and a cache is a
    prompt of that row. After it the row's whole sequence is cut to the budget: earlier turns and
    what was decoded count and compete, and what has gone stays away. So a long prompt may be fed in
    pieces, and the cache stays within the budget over many turns. Shorter forwards, decoding
    among them, only append. Without a cache nothing is done, and a budget of 1.0 changes no bit.

    `generate` (greedy, sampling, beams), batches padded on either side and shared key heads work,
    with sdpa and eager attention. Rows are filled up to the one that keeps most. A cache stays
    compressed after the block, but to decode from it with padding or eager attention needs it.

    Raises `BadInput` for a model that cannot be compressed, or is already; and the model's forwards
    do for what would go wrong: caches of other kinds than `DynamicCache`, padding given in another
    form than [rows, length], other attention, assisted decoding, `torch.compile`.
    """
    engine = attach_cache(model, policy)
    try:
        yield engine
    finally:
        engine.remove()


def attach_cache(model: Any, policy: CachePolicy) -> CacheEngine:
    """`compressing` until `detach_cache`."""
    family, attentions = find_cached(model)
    if cache_engine_of(family.decoder) is not None or engine_of(family.decoder) is not None:
        raise BadInput(
            "tokens of this model are pruned or compressed already",
            where=type(model).__name__,
            mend="leave the block or detach first",
        )
    engine = CacheEngine(model, family, attentions, policy)
    for name, given in (("shares", policy.shares), ("head_groups", policy.head_groups)):
        if given is not None and len(given) != len(attentions):
            raise BadInput(
                "the policy is for another model",
                where=name,
                got=f"{len(given)} layers",
                expected=f"{len(attentions)} with attention",
            )
    heads = engine.key_heads
    if any(head >= heads for group in policy.head_groups or () for head in group):
        raise BadInput(
            "there is no such head",
            where="head_groups",
            got=max(head for group in policy.head_groups or () for head in group),
            expected=f"key heads 0 to {heads - 1}",
        )
    engine.attach()
    return engine


def detach_cache(model: Any) -> None:
    """Undo `attach_cache`. Raises `BadInput` where nothing is attached."""
    _engine(model).remove()


def cache_report(model: Any) -> CacheReport | None:
    """Of the last prompt that was compressed; None before the first."""
    return _engine(model).report


def find_cached(model: Any) -> tuple[Family, dict[int, torch.nn.Module]]:
    """A model's parts, and its attentions by the number of their layer.

    Raises `BadInput`, with the reason, where its cache cannot be compressed.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = find_family(model, TokenPolicy(1, 1.0, "", "visual" if kind in VISUAL else "text"))
    if family.window is not None:
        raise BadInput(
            "layers with a sliding window are not compressed: they keep the last tokens only",
            where=type(model).__name__,
            got=f"a window of {family.window} tokens",
        )
    found = {number: find_attention(layer) for number, layer in enumerate(family.layers)}
    return family, {number: module for number, module in found.items() if module is not None}


def _engine(model: Any) -> CacheEngine:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if (engine := cache_engine_of(decoder)) is None:
        raise BadInput("no cache of this model is compressed", where=type(model).__name__)
    return engine
