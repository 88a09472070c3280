"""What a forward's prompt leaves of each layer of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.tokens.cache_budget import allot, allot_heads
from compress.tokens.cache_policy import CachePolicy
from compress.tokens.cache_scores import SCORERS, Observed, Slots, best, ends

if TYPE_CHECKING:
    import torch

_SEED_STEP = 1_000_003  # a prime above any number of layers


@dataclass(frozen=True)
class CacheReport:
    """What a prompt left in its cache.

    ``tokens``: of each row, its sequence so far without padding. By layer with attention:
    ``slots``, how many tokens its longest head holds for a row, fillers counted; ``before`` and
    ``after``, the bytes of its tensors.
    """

    tokens: tuple[int, ...]
    slots: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def share(self) -> float:
        """What is left of the bytes of all layers together."""
        return sum(self.after) / sum(self.before)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A forward in which a row or more gave a prompt.

    ``attended``: bool [rows, length] of the whole sequence, False for padding, on the CPU. By row,
    ``totals``: its tokens; ``kept``: by layer, how many of them stay, None where the row gave no
    prompt; ``observers``: from where to where in the forward its last tokens stand.
    """

    attended: torch.Tensor
    totals: tuple[int, ...]
    kept: tuple[list[int] | None, ...]
    observers: tuple[tuple[int, int], ...]


def make_prompt(
    attended: torch.Tensor, length: int, layers: int, policy: CachePolicy
) -> Prompt | None:
    """The prompt in the last ``length`` tokens of a sequence; None where no row gives one."""
    shares = policy.shares or (1.0,) * layers
    totals, kept, observers = tuple(attended.sum(1).tolist()), [], []
    for real, total in zip(attended[:, -length:], totals, strict=True):
        places = real.nonzero().flatten().tolist()
        long = len(places) > policy.least
        kept.append(allot(total, policy.budget, shares, policy.least) if long else None)
        observers.append((places[-policy.window], places[-1] + 1) if long else (0, 0))
    if not any(kept):
        return None
    return Prompt(attended, totals, tuple(kept), tuple(observers))


def compress_layer(
    layer: Any, order: int, prompt: Prompt, observed: Observed, policy: CachePolicy
) -> Any:
    """A cache's ``layer``, number ``order`` of those with attention, cut to what is to stay of it.

    ``observed``: the layer's attention in the forward of the ``prompt``. The layer itself where
    nothing goes.
    """
    import torch

    from compress.tokens.cache_layer import cut, valid_slots

    with torch.no_grad():
        keys = layer.keys
        high = policy.head_groups[order] if policy.head_groups else ()
        valid = valid_slots(layer, prompt.attended.to(keys.device))
        counts = valid.sum(-1).expand(-1, keys.shape[1])
        wanted = _wanted(prompt, order, high, policy, keys.shape[1]).to(keys.device)
        keep = torch.minimum(wanted, counts)
        if not (keep < counts).any():
            return layer
        always = ends(valid, policy.sinks, policy.window)
        received = partial(_received, prompt, observed, keys)
        slots = Slots(keys, valid, always, received, policy.seed * _SEED_STEP + order)
        place = best(SCORERS[policy.scorer](slots), slots, keep)
        low = [head for head in range(keys.shape[1]) if head not in high]
        return cut(layer, place, [group for group in (sorted(high), low) if group])


def _wanted(
    prompt: Prompt, order: int, high: tuple[int, ...], policy: CachePolicy, heads: int
) -> torch.Tensor:
    """int64 [rows, key heads]: how many tokens are to stay; all where a row gave no prompt."""
    import torch

    return torch.tensor(
        [
            [total] * heads
            if kept is None
            else allot_heads(kept[order], total, heads, high, policy.least)
            for kept, total in zip(prompt.kept, prompt.totals, strict=True)
        ]
    )


def _received(prompt: Prompt, observed: Observed, keys: torch.Tensor) -> torch.Tensor:
    """float32 [rows, key heads, slots]: the attention of the last tokens of rows with a prompt."""
    import torch

    found = torch.zeros(keys.shape[:3], device=keys.device)
    for row, (start, stop) in enumerate(prompt.observers):
        if stop:
            found[row] = observed.received(keys[row], row, start, stop)
    return found
