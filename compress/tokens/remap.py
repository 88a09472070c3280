"""What layers without the pruned tokens need in another shape: masks, positions, caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Held:
    """The tokens whose keys the later layers hold: ``index`` and ``valid`` [rows, held].

    ``index`` (int64) counts from the beginning of the sequence, padding included. Rows that keep
    fewer tokens than others are filled up from the left with pruned ones, which are not ``valid``:
    no other token sees them. ``ragged``: whether there are such.
    """

    index: torch.Tensor
    valid: torch.Tensor
    ragged: bool

    def then(self, other: Held) -> Held:
        """These tokens and the ``other`` ones after them."""
        import torch

        index = torch.cat([self.index, other.index], 1)
        valid = torch.cat([self.valid, other.valid], 1)
        return Held(index, valid, self.ragged or other.ragged)

    def to(self, device: torch.device) -> Held:
        return Held(self.index.to(device), self.valid.to(device), self.ragged)


def all_of(rows: int, start: int, stop: int, device: torch.device) -> Held:
    """Every token from ``start`` to ``stop``."""
    import torch

    index = torch.arange(start, stop, device=device).expand(rows, -1)
    return Held(index, torch.ones_like(index, dtype=torch.bool), False)


def only(keep: torch.Tensor, longest: int, ragged: bool) -> Held:
    """The tokens that bool ``keep`` [rows, length] names, at most ``longest`` of them in a row."""
    import torch

    order = torch.argsort(keep.byte(), dim=1, stable=True)
    index = order[:, keep.shape[1] - longest :]
    return Held(index, keep.gather(1, index), ragged)


def pick(states: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """Of ``states`` the tokens ``index`` [rows, n] along ``dim``, the one after that of the rows.

    Rows may be 1 for all; dimensions may lead (mRoPE) and follow.
    """
    dim %= states.ndim
    shape = [1] * (dim - 1) + list(index.shape) + [1] * (states.ndim - dim - 1)
    sizes = list(states.shape)
    sizes[dim - 1 : dim + 1] = index.shape
    states = states.expand(*states.shape[: dim - 1], len(index), *states.shape[dim:])
    return states.gather(dim, index.view(shape).expand(sizes))


def put_back(
    states: torch.Tensor, whole: torch.Tensor, index: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """``whole`` [rows, length, D] with the rows' tokens ``index`` replaced by ``states``.

    ``valid``: which of them are meant; None: all.
    """
    import torch

    places = index[..., None].expand_as(states)
    if valid is not None:
        states = torch.where(valid[..., None], states, whole.gather(1, places))
    return whole.scatter(1, places, states)


def remap_mask(
    mask: torch.Tensor | None, queries: torch.Tensor | None, keys: Held, length: int, flash: bool
) -> torch.Tensor | None:
    """The mask for ``queries`` (index [rows, n] into the forward; None: all) looking at ``keys``.

    ``mask``: as for all ``length`` tokens of the forward; 4-D (bool: seen, or added to the scores),
    2-D for flash attention (of the keys), or None where plain causality needs none.
    """
    import torch

    rows, held = keys.index.shape
    if mask is not None and mask.ndim == 2:
        return mask.gather(1, keys.index).to(mask.dtype) * keys.valid.to(mask.dtype)
    if flash or mask is None:
        if not keys.ragged:
            return None
        if flash:
            return keys.valid
    asking = length if queries is None else queries.shape[1]
    places = torch.arange(held, device=keys.index.device)
    own = places[held - asking :, None]  # a token's own place among the keys
    if mask is None:
        seen = (places <= own).expand(rows, 1, -1, -1)
    else:
        seen = mask.expand(rows, *mask.shape[1:])
        if queries is not None:
            seen = seen.gather(
                2, queries[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[3])
            )
        index = keys.index[:, None, None]
        seen = seen.gather(3, index.expand(*seen.shape[:3], -1))
    if not keys.ragged:
        return seen
    # Fillers see themselves, for a softmax over nothing would make NaNs of them.
    hidden = ~keys.valid[:, None, None] & (places != own)
    if seen.dtype == torch.bool:
        return seen & ~hidden
    return seen.masked_fill(hidden, torch.finfo(seen.dtype).min)


@dataclass
class _Mark:
    """Of the last pruned forward: the sequence's and the later layers' length after it."""

    length: int
    held: int
    ragged: bool
    closes: tuple[bool, ...]


class Memory:
    """A cache's record of the tokens that its later layers hold, inside of the cache.

    It is one more layer at the end, with the index in place of keys and validity in place of
    values, so whatever reorders, repeats, crops or copies the cache does the same to the record.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @classmethod
    def of(cls, cache: Any) -> Memory | None:
        """The record of a cache; None where all its layers hold the same tokens, or none."""
        if cache is None or not cache.get_seq_length():
            return None
        layer = cache.layers[-1]
        marked = getattr(layer, "entropress", None) is not None
        return cls(layer) if marked and layer.is_initialized else None

    @property
    def closes(self) -> tuple[bool, ...]:
        """Of each row, whether the last forward ended in the middle of a segment, maybe."""
        return self._layer.entropress.closes

    def held(self, past: int) -> Held:
        """What the later layers hold of ``past`` tokens in the first.

        Raises `BadInput` where they have not gone together since the tokens were pruned.
        """
        mark, layer = self._layer.entropress, self._layer
        added = layer.keys.shape[2] - mark.held
        if added < 0 or past - mark.length != added:
            raise BadInput(
                "the cache was cropped into a pruned prompt, or used without its pruning",
                got=f"{past} tokens, {layer.keys.shape[2]} of them in later layers",
                mend="begin with an empty cache",
            )
        return Held(layer.keys[:, 0, :, 0], layer.values[:, 0, :, 0], mark.ragged)

    @classmethod
    def write(
        cls, cache: Any, layers: int, held: Held, length: int, closes: tuple[bool, ...] | None
    ) -> None:
        """Record in ``cache`` what its later layers hold after a forward of a model of ``layers``.

        ``closes``: of a forward that had candidates; None: it had none.
        """
        from transformers.cache_utils import DummyLayer, DynamicLayer

        if not cache.get_seq_length():
            return  # checkpointing gradients, it was not filled
        layer = cache.layers[-1]
        if getattr(layer, "entropress", None) is None:
            # A model that skips attention tells a cache made for it from others by its length.
            while len(cache.layers) < layers:
                cache.layers.append(DummyLayer())
            layer = DynamicLayer()
            cache.layers.append(layer)
        layer.keys, layer.values = held.index[:, None, :, None], held.valid[:, None, :, None]
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        layer.is_initialized = True
        if closes is not None:
            layer.entropress = _Mark(length, layer.keys.shape[2], held.ragged, closes)
        else:
            layer.entropress.closes = ()
