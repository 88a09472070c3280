"""How many tokens to keep, by what they may cost."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from compress.errors import BadInput, did_you_mean
from compress.tokens.flops import prompt_cost

MEASURES = ("kept", "average", "flops")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class KeepBudget:
    """At most this much is to be left when tokens go once, before one decoder layer.

    ``measure``: "kept", the tokens that remain from that layer on; "average", the tokens averaged
    over all layers, which is also what their keys and values take (EntropyPrune's, arXiv
    2602.17196: ``s = (L avg - K N) / (L - K)``); "flops", the operations of the prompt in the
    decoder layers, text included, as `PromptCost` counts them, which for a stack like Llama's are
    the paper's ``8 n d^2 + 4 n^2 d + 6 n d m`` a layer.

    ``amount``: a float is a share, above 0 and up to 1, of what there is without pruning; an int,
    for the first two, a number of tokens.
    """

    measure: str
    amount: float | int

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise BadInput(
                f"unknown measure '{self.measure}'", mend=did_you_mean(self.measure, MEASURES)
            )
        if not 0 < self.amount <= (math.inf if self._in_tokens else 1):
            raise BadInput(
                "no such budget",
                where=self.measure,
                got=self.amount,
                expected="1 token or more" if self._in_tokens else "a share above 0, at most 1",
            )

    @property
    def _in_tokens(self) -> bool:
        return isinstance(self.amount, int) and self.measure != "flops"

    def resolve(self, config: Any, *, layer: int, visual: int, text: int = 0) -> int:
        """The most of ``visual`` tokens that may stay from ``layer`` on, beside ``text`` others.

        ``config``: the model's, of transformers. Raises `BadInput` for a layer that is not between
        the first and the last, and, naming the least that can be reached, where none could stay.
        """
        layers = config.get_text_config(decoder=True).num_hidden_layers
        if not 1 <= layer < layers:
            raise BadInput(
                "tokens cannot go there", where="layer", got=layer, expected=f"1 to {layers - 1}"
            )
        if visual < 1:
            raise BadInput("there are no tokens to choose from", got=visual)
        if self.measure == "flops":
            return self._by_flops(config, layers, layer, visual, text)
        amount = self.amount if self._in_tokens else self.amount * visual
        if amount > visual:
            raise BadInput("there are not so many tokens", got=amount, expected=f"at most {visual}")
        before = layer if self.measure == "average" else 0
        after = layers - before
        kept = math.floor((layers * amount - before * visual) / after + _ROUNDING)
        if kept < 1:
            self._refuse((before * visual + after) / layers, visual)
        return kept

    def _by_flops(self, config: Any, layers: int, layer: int, visual: int, text: int) -> int:
        cost = prompt_cost(config)

        def flops(kept: int) -> int:
            return cost.flops([visual + text] * layer + [kept + text] * (layers - layer))

        full = flops(visual)
        kept = bisect_right(range(1, visual + 1), self.amount * full, key=flops)
        if not kept:
            self._refuse(flops(1), full)
        return kept

    def _refuse(self, least: float, full: int) -> None:
        share = math.ceil(1e4 * least / full) / 1e4  # up, so that what is named is enough
        raise BadInput(
            "no token would be left",
            where=self.measure,
            got=self.amount,
            expected=f"at least {math.ceil(least) if self._in_tokens else share}",
            mend="allow more, or let tokens go before an earlier layer",
        )
