"""The queries and attention of one layer, from what its projections gave in the forward itself.

Nothing asks the model for attention weights, so it may run any implementation of attention.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput

if TYPE_CHECKING:
    import torch

# What gives queries and keys: modules of their own, all in one (queries, keys, values), or
# all in one head by head.
_SEPARATE, _JOINT, _BY_HEAD = ("q_proj", "k_proj"), ("qkv_proj", "c_attn"), ("query_key_value",)
_WEIGHTS_AT_ONCE = 2**24  # of heads, rows and keys together: 64 MiB


def projections(attention: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules whose outputs hold the queries and keys; none for what is no known attention."""
    modules = dict(attention.named_children())
    if all(name in modules for name in _SEPARATE):
        return {name: modules[name] for name in _SEPARATE}
    return {name: modules[name] for name in (*_JOINT, *_BY_HEAD) if name in modules}


def count_heads(attention: torch.nn.Module, config: Any) -> tuple[int, int]:
    """Of queries and of keys. A config may speak of shared keys that its family does not know."""
    heads: int = config.num_attention_heads
    if any(name in _BY_HEAD for name in projections(attention)):
        return heads, heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


@dataclass(eq=False)
class Attended:
    """One layer's queries and keys in one forward over [rows, length] tokens.

    ``outputs``: of `projections`, by name, [rows, length, ...]; ``mask``: that the layer was given;
    ``rotation``: cos and sin [rows or 1, length, d] if it rotates; ``past_keys``: [rows, key heads,
    past, d], rotated, of the ``past`` tokens before, None where there are none or unknown.
    """

    attention: Any
    heads: int
    key_heads: int
    mask: torch.Tensor | None
    rotation: tuple[torch.Tensor, torch.Tensor] | None
    past: int
    past_keys: torch.Tensor | None
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    _keys: dict[int, torch.Tensor] = field(default_factory=dict)

    def queries(self, row: int, start: int, stop: int) -> torch.Tensor:
        """[stop - start, heads, d] before rotation, after a norm of queries if there is one."""
        return self._heads("q", row, start, stop)

    def last(self, row: int, token: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start]: what ``token`` attends to, mean over heads."""
        weights = self._weights(row, token, token + 1)
        return weights.mean(0)[0, self.past + start : self.past + stop]

    def mutual(self, row: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start]: how much these tokens attend to each of them on average."""
        length = next(iter(self.outputs.values())).shape[1]
        step = max(1, _WEIGHTS_AT_ONCE // (self.heads * (self.past + length)))
        columns = slice(self.past + start, self.past + stop)
        total: Any = 0
        for first in range(start, stop, step):
            weights = self._weights(row, first, min(first + step, stop))
            total = total + weights[..., columns].mean(0).sum(0)
        return total / (stop - start)

    def _weights(self, row: int, start: int, stop: int) -> torch.Tensor:
        """float32 [heads, stop - start, past + length]: the weights of these tokens."""
        import torch

        queries = self._heads("q", row, start, stop).transpose(0, 1)[None]
        queries = self._rotate(queries, row, start, stop)[0]
        keys = self._row_keys(row)
        # Heads that share keys side by side: [key heads, sharing, tokens, d].
        shared = queries.float().unflatten(0, (self.key_heads, -1))
        scores = shared @ keys.float().mT[:, None] * self.attention.scaling
        if cap := getattr(self.attention, "attn_logit_softcapping", None):
            scores = torch.tanh(scores / cap) * cap
        scores = self._masked(scores.flatten(0, 1), row, start, stop)
        return scores.softmax(-1)

    def _masked(self, scores: torch.Tensor, row: int, start: int, stop: int) -> torch.Tensor:
        import torch

        lowest = torch.finfo(scores.dtype).min
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask[min(row, len(self.mask) - 1), :, start:stop]
            return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        tokens = torch.arange(start, stop, device=scores.device)[:, None] + self.past
        hidden = torch.arange(scores.shape[-1], device=scores.device) > tokens
        if self.mask is not None:  # [rows, past + length], of flash attention
            hidden = hidden | ~self.mask[row].bool()
        return scores.masked_fill(hidden, lowest)

    def _row_keys(self, row: int) -> torch.Tensor:
        """[key heads, past + length, d] after rotation; kept, for a row may hold many segments."""
        import torch

        if row not in self._keys:
            length = next(iter(self.outputs.values())).shape[1]
            keys = self._heads("k", row, 0, length).transpose(0, 1)[None]
            keys = self._rotate(keys, row, 0, length)[0]
            if self.past:
                if self.past_keys is None or self.past_keys.shape[-2] != self.past:
                    raise BadInput(
                        "attention to earlier turns is not known: this cache hides its keys",
                        mend="use a DynamicCache, or a selector that does not look at attention",
                    )
                keys = torch.cat([self.past_keys[row], keys], 1)
            self._keys[row] = keys
        return self._keys[row]

    def _rotate(self, states: torch.Tensor, row: int, start: int, stop: int) -> torch.Tensor:
        """[1, heads, tokens, d] with the positions of tokens ``start`` to ``stop`` in it."""
        if self.rotation is None:
            return states
        cos, sin = (part[min(row, len(part) - 1)][None, start:stop] for part in self.rotation)
        rotated: torch.Tensor = self._rotary(states, states[:, :0], cos, sin)[0]
        return rotated

    @cached_property
    def _rotary(self) -> Any:
        """The family's own function of queries, keys, cos and sin; it knows of partial rotation."""
        return vars(sys.modules[type(self.attention).__module__])["apply_rotary_pos_emb"]

    def _heads(self, which: str, row: int, start: int, stop: int) -> torch.Tensor:
        """[tokens, heads, d] of the queries or keys, before rotation, after their norm."""
        heads = self.heads if which == "q" else self.key_heads
        name = f"{which}_proj"
        if name in self.outputs:
            states = self.outputs[name][row, start:stop].unflatten(-1, (heads, -1))
            norm = getattr(self.attention, f"{which}_norm", None)
            return states if norm is None else norm(states)
        name, output = next(iter(self.outputs.items()))
        both = output[row, start:stop]
        if name in _BY_HEAD:
            return both.unflatten(-1, (self.heads, -1)).chunk(3, -1)["qk".index(which)]
        size = both.shape[-1] // (self.heads + 2 * self.key_heads)
        first = 0 if which == "q" else self.heads
        return both[:, first * size : (first + heads) * size].unflatten(-1, (heads, -1))
