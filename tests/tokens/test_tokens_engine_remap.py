"""Masks, places and the record of a cache, piece by piece."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from compress.errors import BadInput
from compress.tokens.remap import Held, Memory, all_of, only, pick, put_back, remap_mask

KEEPS = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3).filter(
    lambda rows: all(map(any, rows))
)


def held_of(rows: list[list[bool]]) -> Held:
    keep = torch.tensor(rows)
    counts = [sum(row) for row in rows]
    return only(keep, max(counts), min(counts) < max(counts))


@settings(max_examples=50, deadline=None)
@given(KEEPS)
def test_rows_are_right_aligned_and_put_back(rows: list[list[bool]]) -> None:
    held, whole = held_of(rows), torch.randn(len(rows), 7, 3)
    for row, index, valid in zip(rows, held.index, held.valid, strict=True):
        tokens = [i for i, kept in enumerate(row) if kept]
        assert index[len(index) - len(tokens) :].tolist() == tokens
        assert valid.tolist() == [False] * (len(index) - len(tokens)) + [True] * len(tokens)
    short = pick(whole, held.index, 1)
    again = put_back(short + 1, whole, held.index, held.valid if held.ragged else None)
    assert torch.equal(again, whole + torch.tensor(rows)[..., None])


@settings(max_examples=50, deadline=None)
@given(KEEPS, st.sampled_from([0, 2]), st.sampled_from(["bool", "float", "none"]))
def test_masks_show_what_they_showed_and_no_fillers(
    rows: list[list[bool]], past: int, kind: str
) -> None:
    """Before these seven tokens there may have been two, all held, and the first one padding."""
    new, before = held_of(rows), all_of(len(rows), 0, past, torch.device("cpu"))
    keys = before.then(Held(new.index + past, new.valid, new.ragged))
    seen = torch.ones(7, 7 + past, dtype=torch.bool).tril(past)
    seen = seen.expand(len(rows), 1, -1, -1).clone()
    if past and kind != "none":
        seen[..., 0] = False
    lowest = torch.finfo(torch.float32).min
    masks = {"bool": seen, "float": torch.where(seen, 0.0, lowest), "none": None}
    found = remap_mask(masks[kind], new.index, keys, 7, flash=False)
    if found is None:  # plain causality, of which sdpa knows
        assert kind == "none"
        assert not keys.ragged
        return
    found = found if found.dtype == torch.bool else found == 0
    for row in range(len(rows)):
        for i, (query, real) in enumerate(zip(new.index[row], new.valid[row], strict=True)):
            assert found[row, 0, i].any()  # or its softmax would be over nothing
            for j, (key, valid) in enumerate(zip(keys.index[row], keys.valid[row], strict=True)):
                if real:
                    expected = bool(seen[row, 0, query, key]) and bool(valid)
                    assert bool(found[row, 0, i, j]) == expected


def test_flash_attention_gets_masks_of_keys() -> None:
    """Its kernels are not run here; these are the masks that they would be given."""
    same = held_of([[True, False, True], [False, True, True]])
    assert remap_mask(None, same.index, same, 3, flash=True) is None
    ragged = held_of([[True, False, True], [False, False, True]])
    mask = remap_mask(None, ragged.index, ragged, 3, flash=True)
    assert mask.tolist() == [[True, True], [False, True]]
    padding = torch.tensor([[False, True, True], [True, True, True]])
    mask = remap_mask(padding, ragged.index, ragged, 3, flash=True)
    assert mask.tolist() == [[False, True], [False, True]]


def test_positions_may_have_leading_dimensions() -> None:
    index = torch.tensor([[0, 2], [1, 2]])
    places = torch.arange(18).view(3, 2, 3)
    assert pick(places, index, -1).tolist() == [
        [[0, 2], [4, 5]],
        [[6, 8], [10, 11]],
        [[12, 14], [16, 17]],
    ]
    assert pick(places[0, :1], index, -1).tolist() == [[0, 2], [1, 2]]
    rotation = torch.arange(6.0).view(1, 3, 2)
    assert pick(rotation, index, -2).tolist() == [[[0, 1], [4, 5]], [[2, 3], [4, 5]]]


def test_the_record_does_as_the_cache_does() -> None:
    cache, states = DynamicCache(), torch.zeros(2, 1, 5, 4)
    for layer in range(3):
        cache.update(states[:, :, : 5 - layer], states[:, :, : 5 - layer], layer)
    assert Memory.of(cache) is None
    assert Memory.of(None) is None
    held = Held(torch.tensor([[0, 2, 4], [1, 3, 4]]), torch.ones(2, 3, dtype=torch.bool), False)
    Memory.write(cache, 3, held, 5, (False, True))
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert Memory.of(cache).held(5).index.tolist() == [[1, 3, 4], [0, 2, 4]]
    assert Memory.of(twin).held(5).index.tolist() == [[0, 2, 4], [1, 3, 4]]
    assert Memory.of(twin).closes == (False, True)
    twin.crop(-1)
    with pytest.raises(BadInput, match="cropped into a pruned prompt"):
        Memory.of(twin).held(4)
    cache.reset()
    assert Memory.of(cache) is None
