"""Which cached tokens are worth keeping, and the choice of the best of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.tokens.attention import Attended

if TYPE_CHECKING:
    import torch

_POOL = 5  # SnapKV's kernel: what stands beside a token in demand is kept with it


class Observed(Attended):
    """A layer's queries in one forward, over the keys that its cache holds after it."""

    def received(self, keys: torch.Tensor, row: int, start: int, stop: int) -> torch.Tensor:
        """float32 [key heads, slots]: attention of tokens ``start`` to ``stop``, on average.

        ``keys``: of the row, [key heads, slots, d], those of the forward itself included.
        """
        self._keys[row] = keys
        self.past = keys.shape[1] - next(iter(self.outputs.values())).shape[1]
        weights = self._weights(row, start, stop).mean(1)
        return weights.unflatten(0, (self.key_heads, -1)).mean(1)


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots of one layer of a cache, for a scorer.

    ``keys``: [rows, key heads, slots, d]; ``valid`` and ``always``: bool [rows, 1 or key heads,
    slots], which of them hold a token, and which stay in any case; ``received``: float32 [rows, key
    heads, slots], the attention of the last tokens.
    """

    keys: torch.Tensor
    valid: torch.Tensor
    always: torch.Tensor
    received: Callable[[], torch.Tensor]
    seed: int


def _snapkv(slots: Slots) -> torch.Tensor:
    """Sinks and the last tokens are left out of the pooling, which they would dominate."""
    from torch.nn.functional import avg_pool1d

    received = slots.received().masked_fill(slots.always, 0)
    return avg_pool1d(received, _POOL, stride=1, padding=_POOL // 2)


def _knorm(slots: Slots) -> torch.Tensor:
    return -slots.keys.float().norm(dim=-1)


def _recent(slots: Slots) -> torch.Tensor:
    return slots.valid.cumsum(-1).float().expand(slots.keys.shape[:3])


def _random(slots: Slots) -> torch.Tensor:
    """A number for each head and place in the sequence, so the same in a batch as alone."""
    import torch

    shape = slots.keys.shape[:3]
    drawn = torch.rand(shape[1:].numel(), generator=torch.Generator().manual_seed(slots.seed))
    drawn = drawn.view(shape[2], shape[1]).T.to(slots.keys.device)  # by place first: prefixes agree
    rank = (slots.valid.cumsum(-1) - 1).clamp(min=0)
    return drawn.expand(shape).gather(-1, rank.expand(shape))


SCORERS: dict[str, Callable[[Slots], torch.Tensor]] = {
    "snapkv": _snapkv,
    "knorm": _knorm,
    "random": _random,
    "recent": _recent,
}
"""Of slots, float32 [rows, key heads, slots]: more for those that are to stay."""


def ends(valid: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Of the slots that are ``valid`` [..., slots], the first ``sinks`` and the last ``window``."""
    rank = valid.cumsum(-1)
    return valid & ((rank <= sinks) | (rank > rank[..., -1:] - window))


def best(scores: torch.Tensor, slots: Slots, keep: torch.Tensor) -> torch.Tensor:
    """The slots with the highest scores: int64 [rows, key heads, n], ascending, -1 for none.

    ``keep``: int64 [rows, key heads], how many; as many as are valid, or at least those that stay
    in any case.
    """
    import torch

    scores = scores.masked_fill(~slots.valid, -torch.inf).masked_fill(slots.always, torch.inf)
    longest = int(keep.max())
    order = scores.topk(longest, -1).indices
    counted = torch.arange(longest, device=order.device) < keep[..., None]
    return torch.where(counted, order, -1).sort(-1).values
