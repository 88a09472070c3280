"""How much of a cache each layer and head should get, from the entropy of its queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from compress.errors import BadInput, did_you_mean
from compress.progress import SILENT, Progress
from compress.signals import block_input, check_tokens, ordinary_tokens, truncated_matrix_entropy
from compress.tokens.attention import Attended, count_heads, projections
from compress.tokens.cache import find_cached
from compress.tokens.cache_budget import pyramid, staged
from compress.tokens.cache_policy import CachePolicy
from compress.tokens.collapse import segment_by_entropy

if TYPE_CHECKING:
    import torch

Rule = Literal["uncomp", "pyramid", "uniform"]

_EIGENVALUES = 32
_DROP = 1 / 32  # 1 in the sum over the paper's 32 heads


def calibrate_cache(
    model: Any,
    tokens: torch.Tensor,
    budget: float,
    *,
    rule: Rule = "uniform",
    by_head: bool = True,
    progress: Progress = SILENT,
) -> CachePolicy:
    """A policy whose layers share ``budget`` as ``rule`` says; ``tokens`` as for `query_entropies`.

    "uncomp" (arXiv 2410.03090): a stage begins where the entropy of queries falls, by more than
    1/32 in the mean over heads (the paper's 1 in the sum over 32); each stage gets the mean of
    "pyramid" over its layers, so later ones get less. "pyramid" (arXiv 2406.02069) falls in a line
    from the first layer to the last. "uniform" treats all alike. ``by_head``, UNComp's as well: of
    each layer, the half of the key heads with the highest entropy, rounded down, holds twice as
    much as the others. The defaults are what held up in `benchmarks/kv.py`: entropy by head helped
    there, and by layer it did not.

    Raises `BadInput` for an unknown rule, and what `query_entropies` raises where it is needed.
    """
    if rule not in get_args(Rule):
        raise BadInput(f"unknown rule '{rule}'", mend=did_you_mean(rule, get_args(Rule)))
    family, attentions = find_cached(model)
    entropies: Any = None
    if by_head or rule == "uncomp":
        entropies = query_entropies(model, tokens, progress=progress)
    shares = None
    if rule != "uniform":
        shares = tuple(pyramid(len(attentions)) if rule == "pyramid" else uncomp_shares(entropies))
    _, key_heads = count_heads(next(iter(attentions.values())), family.config)
    groups = high_heads(entropies, key_heads) if by_head else None
    return CachePolicy(budget, shares=shares, head_groups=groups)


def uncomp_shares(entropies: Any) -> list[float]:
    """By layer its share, from the ``entropies`` [layers, heads] of `query_entropies`."""
    return staged(segment_by_entropy(entropies.mean(1).tolist(), _DROP))


def high_heads(entropies: Any, key_heads: int) -> tuple[tuple[int, ...], ...]:
    """By layer the half of its key heads whose queries have the highest entropy in the mean."""
    by_key = entropies.unflatten(1, (key_heads, -1)).mean(2)
    best = by_key.topk(key_heads // 2, 1).indices
    return tuple(tuple(sorted(heads)) for heads in best.tolist())


def query_entropies(
    model: Any, tokens: torch.Tensor, *, progress: Progress = SILENT
) -> torch.Tensor:
    """Truncated matrix entropy of each head's queries: float64 [layers with attention, heads].

    UNComp's: `truncated_matrix_entropy` of the 32 largest eigenvalues, averaged over sequences.
    ``tokens``: int64 [sequences, length], without padding. The queries are those before rotation,
    so that entropy is of what tokens ask for and not of where they stand. The first token and sinks
    of any layer are left out. Raises `BadInput` for a model whose cache cannot be compressed, for
    tokens that are none, and for queries that are not finite.
    """
    import torch

    family, attentions = find_cached(model)
    check_tokens(model.config, tokens)
    config, device = family.config, next(model.parameters()).device
    states: list[torch.Tensor] = []
    outputs: dict[int, dict[str, torch.Tensor]] = {number: {} for number in attentions}

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        states.append(block_input(args, kwargs)[0].float())

    def catch(number: int, name: str, module: Any, args: Any, output: torch.Tensor) -> None:
        outputs[number][name] = output

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in family.layers]
    for number, attention in attentions.items():
        for name, module in projections(attention).items():
            handles.append(module.register_forward_hook(partial(catch, number, name)))
    total = torch.zeros(len(attentions), config.num_attention_heads, dtype=torch.float64)
    try:
        with progress.step("measuring queries", len(tokens), "sequences") as step:
            for sequence in tokens:
                states.clear()
                with torch.inference_mode():
                    model.base_model(input_ids=sequence[None].to(device), use_cache=False)
                    ordinary = _ordinary(states)
                    for row, (number, attention) in zip(total, attentions.items(), strict=True):
                        heads = count_heads(attention, config)
                        found = Attended(
                            attention, *heads, None, None, 0, None, outputs=outputs[number]
                        )
                        queries = found.queries(0, 0, len(sequence))[ordinary]
                        if not queries.isfinite().all():
                            raise BadInput("queries are not finite", where=f"layer {number}")
                        row += torch.tensor(
                            [truncated_matrix_entropy(x, _EIGENVALUES) for x in queries.unbind(1)],
                            dtype=torch.float64,
                        )
                step.advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return total / len(tokens)


def _ordinary(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """bool [length]: the tokens that are sinks in none of the layers' inputs."""
    import torch

    every = torch.ones(len(states[0]), dtype=torch.bool, device=states[0].device)
    return reduce(torch.logical_and, (ordinary_tokens(x, y, every) for x, y in pairwise(states)))
