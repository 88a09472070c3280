"""The token engine: prompts lose tokens before a decoder layer of an unmodified transformers model.

After EntropyPrune (arXiv 2602.17196), FastV (arXiv 2403.06764) and others: what a selector does not
keep of an image (or of a long prompt) stops at layer K. Layers from K on compute and cache only the
rest, at their old positions; layers before K and everything outside of them see all tokens, so
lengths, positions and logits [rows, length, vocabulary] are as ever. A pruned token leaves the
stack with the state that it had before K.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compress.errors import BadInput
from compress.tokens.cache_hooks import cache_engine_of
from compress.tokens.families import find_family
from compress.tokens.hooks import Engine, engine_of
from compress.tokens.policy import TokenPolicy
from compress.tokens.segment import PrefillReport, Selector


@contextmanager
def pruning(
    model: Any, policy: TokenPolicy, *, selector: Selector | None = None
) -> Iterator[Engine]:
    """Inside of the block, ``model`` prunes tokens as ``policy`` says; afterwards it is as before.

    ``selector`` stands in for the policy's own. `generate` (greedy, sampling, beams), plain
    forwards, losses and gradients, batches padded on either side, several images a row, and caches
    with earlier turns all work, with sdpa and eager attention. Flash attention's 2-D masks are
    handled and untested. Every forward of more than one token prunes the segments in it: an image
    may not be split over two of them, and each part of a text prompt is pruned by itself.

    Raises `BadInput` for a model that cannot be pruned, or is already; and the model's forwards do
    for what would go wrong: static caches, a sliding window shorter than the sequence, block masks,
    embeddings without ids (set ``visual_mask`` of the engine), attention weights as outputs,
    assisted decoding, `torch.compile`.
    """
    engine = attach(model, policy, selector=selector)
    try:
        yield engine
    finally:
        engine.remove()


def attach(model: Any, policy: TokenPolicy, *, selector: Selector | None = None) -> Engine:
    """`pruning` until `detach`."""
    if attached(model) is not None:
        raise BadInput(
            "tokens of this model are pruned already",
            where=type(model).__name__,
            mend="leave the block or detach first",
        )
    if cache_engine_of(model.get_decoder()) is not None:
        raise BadInput(
            "its cache is compressed: prompts are not pruned as well",
            where=type(model).__name__,
            mend="detach_cache first",
        )
    if selector is None:
        from compress.tokens.selectors import make_selector

        selector = make_selector(policy.selector, policy.options)
    return Engine(model, find_family(model, policy), policy, selector)


def detach(model: Any) -> None:
    """Undo `attach`. Raises `BadInput` where nothing is attached."""
    _engine(model).remove()


def attached(model: Any) -> Engine | None:
    """The engine that prunes a model's tokens, if one does."""
    return engine_of(model.get_decoder() if hasattr(model, "get_decoder") else model)


def last_report(model: Any) -> PrefillReport | None:
    """Of the last forward that had tokens to prune; None before the first."""
    return _engine(model).report


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """Inside of the block, new prompts stay whole; caches pruned before go on as they are."""
    engine = _engine(model)
    before, engine.enabled = engine.enabled, False
    try:
        yield
    finally:
        engine.enabled = before


def _engine(model: Any) -> Engine:
    if (engine := attached(model)) is None:
        raise BadInput("no tokens of this model are pruned", where=type(model).__name__)
    return engine
