from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.signals import BlockTable, Measurement, protected_blocks


def noisy(spread: float, sequences: int = 12, seed: int = 0) -> BlockTable:
    """Blocks 0 to 5 score 0 to 5, give or take ``spread``."""
    chance = random.Random(seed)
    rows = [[block + chance.gauss(0, spread) for _ in range(sequences)] for block in range(6)]
    return BlockTable({"cosine": rows}, [[0] * sequences] * 6)


def test_what_all_sequences_say_is_firm() -> None:
    found = noisy(0).stability("cosine", [0], drop=2)
    assert found is not None
    assert found.same_choice == 1
    assert found.ranks == [None, (1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]


def test_the_choice_gets_less_firm_with_noise() -> None:
    shares = []
    for spread in (0.1, 2, 10):
        found = noisy(spread).stability("cosine", [], drop=2)
        assert found is not None
        shares.append(found.same_choice)
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.7


def test_two_blocks_that_take_turns_are_told_from_those_that_do_not() -> None:
    turns = [[0.0, 1.0] * 8, [1.0, 0.0] * 8, [9.0] * 16, [10.0] * 16]
    table = BlockTable({"cosine": turns}, [[0] * 16] * 4)
    one, two = (table.stability("cosine", [], drop) for drop in (1, 2))
    assert one is not None
    assert two is not None
    assert 0.3 < one.same_choice < 0.8  # half, and the ties, which the index decides
    assert two.same_choice == 1
    assert one.ranks == two.ranks == [(1, 2), (1, 2), (3, 3), (4, 4)]


def test_an_interval_leaves_five_percent_out_on_either_side() -> None:
    def rare(odd: int, sequences: int) -> BlockTable:
        """Block 1 comes first in the draws that hold one of the odd sequences."""
        row = [-99.0] * odd + [1.0] * (sequences - odd)
        return BlockTable({"cosine": [[0.0] * sequences, row]}, [[0] * sequences] * 2)

    often = rare(1, 5).stability("cosine", [], resamples=2000)
    assert often is not None
    assert often.same_choice == pytest.approx(1 - 0.8**5, abs=0.04)
    assert often.ranks == [(1, 2), (1, 2)]
    nearly_always = rare(3, 6).stability("cosine", [], resamples=2000)
    assert nearly_always is not None
    assert 0.95 < nearly_always.same_choice < 1  # 1 - 0.5^6
    assert nearly_always.ranks == [(2, 2), (1, 1)]


def test_sinks_are_drawn_with_their_sequences() -> None:
    rows = [[0.0] * 6, [5.0] * 6]
    table = BlockTable({"cosine": rows}, [[1, 1, 1, 0, 0, 0], [0] * 6])
    assert table.order("cosine", []) == [1, 0]
    found = table.stability("cosine", [])
    assert found is not None
    assert 0.4 < found.same_choice < 0.9


def test_one_sequence_says_nothing_of_others() -> None:
    assert noisy(0, sequences=1).stability("cosine") is None
    assert Measurement(noisy(0, 1), protected_blocks(6)).to_json()["stability"] == {"cosine": None}


def test_where_so_many_may_not_go_there_is_no_choice() -> None:
    assert noisy(1).stability("cosine", None, drop=3) is not None
    assert noisy(1).stability("cosine", None, drop=4) is None


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(0, 99), st.integers(1, 3))
def test_the_seed_decides_and_ranks_are_places(sequences: int, seed: int, drop: int) -> None:
    table = noisy(3, sequences, seed)
    found = table.stability("cosine", None, drop, resamples=40, seed=seed)
    assert found == table.stability("cosine", None, drop, resamples=40, seed=seed)
    assert found is not None
    assert 0 <= found.same_choice <= 1
    for block, interval in enumerate(found.ranks):
        assert (interval is None) == (block in protected_blocks(6))
        assert interval is None or 1 <= interval[0] <= interval[1] <= 3


def test_a_measurement_tells_its_stability() -> None:
    found = Measurement(noisy(0), protected_blocks(6), drop=2)
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["drop"] == 2
    assert document["stability"]["cosine"] == {
        "same_choice": 1,
        "ranks": [None, None, [1, 1], [2, 2], [3, 3], None],
    }


def test_tables_merge_in_order() -> None:
    a, b, c = (noisy(1, sequences, seed) for seed, sequences in enumerate((2, 3, 1)))
    merged = a.merge(b).merge(c)
    assert merged == a.merge(b.merge(c))
    assert merged.sequences == 6
    assert merged.values["cosine"][4] == [
        value for table in (a, b, c) for value in table.values["cosine"][4]
    ]


@pytest.mark.parametrize(
    "other",
    [
        BlockTable({"norm_ratio": [[0.0]] * 6}, [[0]] * 6),
        BlockTable({"cosine": [[0.0]] * 5}, [[0]] * 5),
    ],
)
def test_tables_of_other_blocks_or_scorers_do_not_merge(other: BlockTable) -> None:
    with pytest.raises(ValueError, match="do not merge"):
        noisy(1).merge(other)
