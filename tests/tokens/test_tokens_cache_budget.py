"""Parts of a budget: exact in sum, within bounds, in proportion."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.tokens.cache_budget import allot, allot_heads, pyramid, staged

SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.floats(0.001, 1), SHARES, st.integers(1, 64))
def test_all_layers_together_keep_the_budget(
    tokens: int, budget: float, shares: list[float], least: int
) -> None:
    kept = allot(tokens, budget, shares, least)
    floor = min(least, tokens)
    assert sum(kept) == max(int(budget * tokens * len(shares) + 1e-9), floor * len(shares))
    assert all(floor <= count <= tokens for count in kept)
    by_share = [count for _, count in sorted(zip(shares, kept, strict=True))]
    assert all(later >= earlier - 1 for earlier, later in pairwise(by_share))


def test_layers_keep_in_proportion_to_their_shares() -> None:
    assert allot(1000, 0.5, [1, 2, 3], 1) == [250, 500, 750]
    assert allot(100, 0.5, [1, 1, 8], 20) == [25, 25, 100]  # what the last cannot use
    assert allot(100, 0.25, [1, 1, 1, 97], 20) == [20, 20, 20, 40]
    assert allot(100, 1.0, [1, 9], 20) == [100, 100]
    assert allot(7, 0.1, [1, 9], 20) == [7, 7]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_heads_keep_what_their_layer_does(data: st.DataObject) -> None:
    heads = data.draw(st.integers(1, 9))
    high = data.draw(st.sets(st.integers(0, heads - 1)))
    least = data.draw(st.integers(1, 30))
    tokens = data.draw(st.integers(least, 1000))
    kept = data.draw(st.integers(least, tokens))
    found = allot_heads(kept, tokens, heads, sorted(high), least)
    assert kept * heads - heads < sum(found) <= kept * heads
    assert all(least <= count <= tokens for count in found)
    assert len({found[head] for head in high}) <= 1
    if 0 < len(high) < heads:
        low = found[min(set(range(heads)) - high)]
        assert found[min(high)] >= low


def test_two_groups_of_heads_are_as_in_the_paper() -> None:
    assert allot_heads(576, 4000, 4, [0, 2], 16) == [768, 384, 768, 384]
    assert allot_heads(90, 100, 2, [1], 16) == [80, 100]  # more there is not
    assert allot_heads(20, 100, 2, [1], 16) == [16, 24]
    assert allot_heads(20, 100, 3, [], 16) == [20, 20, 20]


def test_a_pyramid_falls_in_a_line_and_stages_in_steps() -> None:
    line = pyramid(5)
    assert line == pytest.approx([1.95, 1.475, 1.0, 0.525, 0.05])
    assert sum(line) == pytest.approx(5)
    steps = staged([0, 0, 1, 1, 1])
    assert steps == pytest.approx([1.7125, 1.7125, 0.525, 0.525, 0.525])
    assert staged([0, 0, 0]) == pytest.approx([1, 1, 1])
