"""Windows of blocks: of equal size, or cut where the entropy is low."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.quant.qat.partition import block_entropies, entropy_windows, uniform_windows
from compress.signals import ordinary_tokens


def test_uniform_windows_leave_the_rest_for_the_last() -> None:
    assert uniform_windows(10, 4) == [range(4), range(4, 8), range(8, 10)]
    assert uniform_windows(4, 2) == [range(2), range(2, 4)]
    assert uniform_windows(3, 8) == [range(3)]
    assert uniform_windows(0, 2) == []


@pytest.mark.parametrize("size", [0, -1])
def test_windows_need_a_block(size: int) -> None:
    with pytest.raises(BadInput, match="window: a window needs a block"):
        uniform_windows(4, size)
    with pytest.raises(BadInput, match="window: a window needs a block"):
        entropy_windows([1.0], size)


def by_force(entropies: list[float], size: int) -> list[range]:
    """All partitions in as many windows as uniform ones, in the order of their cuts."""
    count = len(entropies)
    windows = math.ceil(count / size)
    found = []
    for cuts in combinations(range(1, count), windows - 1):
        ends = (0, *cuts, count)
        if all(end - first <= size for first, end in pairwise(ends)):
            price = sum((Fraction(entropies[cut - 1]) for cut in cuts), Fraction())
            found.append((price, cuts, [range(*pair) for pair in pairwise(ends)]))
    return min(found, key=lambda each: each[:2])[2]


@given(
    st.lists(
        st.sampled_from([0.1, 0.2, 0.3, 1.5, -2.0]) | st.floats(-9, 9), min_size=1, max_size=9
    ),
    st.integers(1, 10),
)
def test_no_partition_is_cheaper_or_as_cheap_and_earlier(entropies: list[float], size: int) -> None:
    assert entropy_windows(entropies, size) == by_force(entropies, size)


def test_cuts_are_where_the_entropy_is_low() -> None:
    assert entropy_windows([5, 1, 5, 5, 2, 5, 5], 3) == [range(2), range(2, 5), range(5, 7)]
    assert entropy_windows([1, 1, 1, 1, 1], 3) == [range(2), range(2, 5)]
    # The last block's own entropy is never paid, and 6 blocks by 3 leave no choice.
    assert entropy_windows([0, 0, 9, 0, 0, -99], 3) == [range(3), range(3, 6)]
    assert entropy_windows([], 3) == []


def test_sums_are_exact() -> None:
    """In floats 0.3 + 0.1 equals 0.2 + 0.2; the numbers that these floats are add up to less."""
    assert entropy_windows([0.2, 0.3, 0.2, 0.1, 0.2], 2) == [range(2), range(2, 4), range(4, 5)]


def test_many_blocks_are_no_trouble() -> None:
    entropies = [math.sin(block) for block in range(200)]
    windows = entropy_windows(entropies, 4)
    assert len(windows) == 50
    assert [block for window in windows for block in window] == list(range(200))
    assert max(map(len, entropy_windows(entropies, 7))) <= 7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entropies_are_numbers(bad: float) -> None:
    with pytest.raises(BadInput, match="block 1: its entropy is not finite"):
        entropy_windows([1.0, bad], 1)


def expected_entropies(model: Any, tokens: torch.Tensor) -> list[float]:
    """Written out, from the states that transformers shows."""
    model.model.norm, norm = torch.nn.Identity(), model.model.norm  # or the last would be normed
    rows = []
    with torch.no_grad():
        for row in tokens:
            states = model.model(row[None], output_hidden_states=True).hidden_states
            found = []
            for x, y in pairwise(states):
                keep = ordinary_tokens(x[0], y[0], torch.ones(len(row), dtype=torch.bool))
                size = y[0][keep].double().abs()
                shares = size / size.sum(1, keepdim=True)
                found.append(float(-(shares * shares.log()).sum(1).mean()))
            rows.append(found)
    model.model.norm = norm
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("scale", "channels"), [(1000, 3), (14, 32)])
def test_entropies_are_those_of_the_channels_of_ordinary_tokens(
    scale: float, channels: int, make_model: Any, make_tokens: Any
) -> None:
    """One token is a sink wherever it stands: all the way up, or only before the first block."""
    model, tokens = make_model(num_hidden_layers=3), make_tokens()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= scale
        model.model.embed_tokens.weight[7, channels:] = 0
    assert (tokens == 7).any()
    found = block_entropies(model, tokens)
    assert found == pytest.approx(expected_entropies(model, tokens), rel=1e-6)
    assert all(0 < entropy < math.log(32) for entropy in found)
    without = tokens.where(tokens != 7, 8)
    assert block_entropies(model, without) == pytest.approx(found, rel=0.05)


def test_entropies_depend_on_no_number_of_threads_and_leave_no_hook(
    make_model: Any, make_tokens: Any
) -> None:
    model, tokens = make_model(), make_tokens(sequences=3)
    found = block_entropies(model, tokens)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert block_entropies(model, tokens) == found
    finally:
        torch.set_num_threads(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_channel_alone_has_no_entropy(make_model: Any, make_tokens: Any) -> None:
    model = make_model()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
        model.model.embed_tokens.weight[:, 4] = -3.0
    assert block_entropies(model, make_tokens()) == [0.0, 0.0]
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(2.0)
    assert block_entropies(model, make_tokens()) == pytest.approx([math.log(32)] * 2)


def test_states_that_are_not_finite_are_named(make_model: Any, make_tokens: Any) -> None:
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.inf
    with pytest.raises(BadInput, match="block 1: activations are not finite"):
        block_entropies(model, make_tokens())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
