"""A layer of a transformers cache that holds some tokens of a sequence and knows the length of all.

Imported inside of functions only, since transformers comes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from compress.errors import BadInput


class CompressedLayer(DynamicLayer):
    """Keys and values of chosen tokens, and of all that were appended since.

    Heads lie in ``groups``, each in tensors of its own, [rows, heads, slots, d], as long as its
    heads need. ``keys`` and ``values`` are what attention reads, [rows, key heads, slots, d]:
    shorter groups are filled up from the left for the time of the call. ``valid``: bool [rows, 1
    or key heads, held], which of the first slots hold a token; those that do not fill up the rows
    and heads that keep fewer; None after a reset, which leaves an ordinary layer. ``missing``: how
    many tokens of the sequence have no slot.

    Whatever reorders, repeats, selects or copies a cache's rows does the same to all of this.
    """

    def __init__(self, keys: Any, values: Any, valid: Any, missing: int, groups: Any) -> None:
        self.valid, self.missing, self.groups = valid, missing, groups
        self.ragged = not bool(valid.all())
        order = [head for heads in groups for head in heads]
        self._place = [order.index(head) for head in range(len(order))]
        self.parts: list[DynamicLayer] = []
        for key, value in zip(keys, values, strict=True):
            part = DynamicLayer()
            part.update(key, value)
            self.parts.append(part)

    @property
    def keys(self) -> Any:
        return self._join([part.keys for part in self.parts])

    @property
    def values(self) -> Any:
        return self._join([part.values for part in self.parts])

    @property
    def is_initialized(self) -> bool:
        return self.parts[0].is_initialized

    @property
    def slots(self) -> int:
        return max(part.get_seq_length() for part in self.parts)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        for heads, part in zip(self.groups, self.parts, strict=True):
            part.update(key_states[:, heads], value_states[:, heads])
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.slots + self.missing

    def crop(self, tokens_to_remove: int) -> None:
        later = self.slots - (0 if self.valid is None else self.valid.shape[-1])
        if abs(tokens_to_remove) > later:
            raise BadInput(
                "a compressed prompt cannot be cropped: not all of its tokens are there",
                got=f"{abs(tokens_to_remove)} tokens to remove",
                expected=f"at most the {later} that came after it",
                mend="begin with an empty cache",
            )
        self._each("crop", tokens_to_remove)

    def reset(self) -> None:
        self._each("reset")
        self.valid, self.missing = None, 0

    def offload(self) -> None:
        self._each("offload")

    def prefetch(self) -> None:
        self._each("prefetch")

    def reorder_cache(self, beam_idx: Any) -> None:
        self._each("reorder_cache", beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each("batch_repeat_interleave", repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Any) -> None:
        self._each("batch_select_indices", indices)
        if self.valid is not None:
            self.valid = self.valid[indices]

    def _each(self, name: str, *args: Any) -> None:
        for part in self.parts:
            getattr(part, name)(*args)

    def _join(self, states: list[Any]) -> Any:
        if len(states) == 1:
            return states[0]
        slots = max(part.shape[-2] for part in states)
        pad = torch.nn.functional.pad
        same = [pad(part, (0, 0, slots - part.shape[-2], 0)) for part in states]
        return torch.cat(same, 1)[:, self._place]


def cut(layer: Any, place: torch.Tensor, groups: Sequence[Sequence[int]]) -> CompressedLayer:
    """What is left of ``layer`` when its heads keep the slots ``place`` alone.

    ``place``: int64 [rows, key heads, n], ascending, -1 for none. All that is kept is copied, so
    that nothing holds on to the rest.
    """
    whole = layer.keys, layer.values
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for heads in groups:
        own = place[:, list(heads)]
        own = own[..., place.shape[-1] - int((own >= 0).sum(-1).max()) :]
        index = own.clamp(min=0)[..., None]
        for states, kept in zip(whole, (keys, values), strict=True):
            states = states[:, list(heads)]
            kept.append(states.gather(2, index.expand(-1, -1, -1, states.shape[-1])))
    valid = place >= 0 if len(groups) > 1 else place[:, :1] >= 0
    missing = layer.get_seq_length() - place.shape[-1]
    return CompressedLayer(keys, values, valid, missing, [list(heads) for heads in groups])


def slots_of(layer: Any) -> int:
    """For how many tokens of a row a layer of a cache has a place in its longest head."""
    return layer.slots if isinstance(layer, CompressedLayer) else layer.get_seq_length()


def stored_bytes(layer: Any) -> int:
    """What the tensors of a cache's layer take."""
    parts = getattr(layer, "parts", [layer])
    tensors = [tensor for part in parts for tensor in (part.keys, part.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def valid_slots(layer: Any, attended: torch.Tensor) -> torch.Tensor:
    """bool [rows, 1 or key heads, slots]: which slots of a layer hold a token that is no padding.

    ``attended``: bool [rows, length] of the whole sequence.
    """
    held = getattr(layer, "valid", None)
    if held is None:
        return attended[:, None]
    recent = attended[:, None, attended.shape[1] - (layer.slots - held.shape[-1]) :]
    return torch.cat([held, recent.expand(-1, held.shape[1], -1)], -1)


def layer_mask(mask: torch.Tensor | None, layer: Any, length: int, heads: int) -> Any:
    """The mask for ``length`` new tokens that look at a `CompressedLayer` and themselves.

    ``mask``: theirs for the whole sequence, [rows, 1, length, all], bool (seen) or added to the
    scores; None where they see all of it. All slots that hold a token are seen: they are earlier.
    """
    valid = layer.valid
    recent = layer.slots - valid.shape[-1] + length
    if mask is None and not layer.ragged:
        return None
    rows = len(valid)
    if valid.shape[1] > 1:
        valid = valid.repeat_interleave(heads // valid.shape[1], 1)
    held = valid[:, :, None].expand(-1, -1, length, -1)
    if mask is None:
        return torch.cat([held, held.new_ones(*held.shape[:3], recent)], -1)
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        held = torch.zeros_like(held, dtype=mask.dtype).masked_fill(~held, lowest)
    new = mask[..., mask.shape[-1] - recent :].expand(rows, held.shape[1], -1, -1)
    return torch.cat([held, new], -1)
