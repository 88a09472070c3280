"""Sentences about the pruning of tokens that page and card share."""

from __future__ import annotations

import math
from collections.abc import Iterator

from compress.report.tokens import RANDOM, Less, TokenPruning
from compress.report.wording import figure, interval

_TELLING = 4  # layers in which an entropy can be told to collapse


def tile(found: TokenPruning) -> tuple[str, str, str]:
    """What share of the tokens stays, from where on, and by whom it is chosen."""
    kind = f"{found.target.capitalize()} tokens kept" if found.target else "Tokens kept"
    return kind, _kept(found), f"from layer {figure(found.layer)} on, by {_chooser(found)}"


def sentences(found: TokenPruning) -> list[str]:
    """What was done and how well it went, the unwelcome included."""
    return list(_sentences(found))


def _sentences(found: TokenPruning) -> Iterator[str]:
    yield _what(found)
    if found.flops is not None:
        yield (
            f"A prompt then takes {_percent(found.flops)} of the floating-point operations of a "
            "whole one, as counted from the sizes of the layers."
        )
    yield _where(found)
    if found.less:
        yield _less(found, found.less)
    if found.losses:
        yield from _losses(found)


def _what(found: TokenPruning) -> str:
    many = f" (an input had {figure(found.tokens)} on average)" if found.tokens is not None else ""
    return (
        f"{_kept(found)} of {_whose(found)}{many} stay from layer {figure(found.layer)} on, "
        f"chosen by {_chooser(found)}."
    )


def _whose(found: TokenPruning) -> str:
    if found.target == "visual":
        return "the visual tokens of each image"
    if found.target != "text":
        return "the tokens"
    ends = f", but for its first {figure(found.sinks)} and last {figure(found.recent)},"
    return f"the tokens of a prompt{ends}"


def _where(found: TokenPruning) -> str:
    """The layer's reason; layers are those of the model that tokens were pruned in."""
    layer, collapse = found.layer, found.collapse
    counted = "Layers are counted from 0"
    if found.gone:
        counted += f", without the block{'s' * (found.gone > 1)} that had been removed before"
    if collapse is None:
        chosen = "the one that the recipe names" if found.named else "only the default"
        if len(found.entropies) < _TELLING:
            return f"{counted}; layer {figure(layer)} is {chosen}."
        return (
            "The entropy of the tokens collapses before no layer, as in many models: layer "
            f"{figure(layer)} is {chosen}. {counted}."
        )
    if collapse == layer:
        return f"It is this layer before which the entropy of the tokens collapses. {counted}."
    why = "the recipe names" if found.named else "the model lets tokens go before"
    return (
        f"The entropy of the tokens collapses before layer {collapse}; {why} layer "
        f"{figure(layer)}. {counted}."
    )


def _less(found: TokenPruning, less: Less) -> str:
    sure = less.low is not None and less.low > 0
    said = (
        "On inputs that the choice has not seen, they lose "
        f"{figure(less.estimate)} {interval(less.low, less.high)} nats a token less than random "
        "tokens do, the mean and its 95 % interval"
    )
    if sure:
        return f"{said}."
    insisted = "; the recipe insists on it" * found.insisted
    return f"{said}: that may be chance{insisted}."


def _losses(found: TokenPruning) -> Iterator[str]:
    each = ", ".join(f"{name} {figure(loss)}" for name, loss in found.losses.items())
    inputs = f", on half of the {found.inputs:,} inputs" if found.inputs else ""
    yield f"Loss by selector{inputs}, the KL from the whole prompt in nats a token: {each}."
    known = {name: loss for name, loss in found.losses.items() if loss is not None}
    worse = [name for name, loss in known.items() if loss > known.get(RANDOM, math.inf)]
    if worse:
        yield f"Worse than random tokens on them: {', '.join(worse)}."


def _kept(found: TokenPruning) -> str:
    if found.keep is None or isinstance(found.keep, int):
        return figure(found.keep)
    return _percent(found.keep)


def _percent(share: float) -> str:
    return f"{figure(100 * share)} %"


def _chooser(found: TokenPruning) -> str:
    return found.selector or "an unknown selector"
