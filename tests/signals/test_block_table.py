from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.signals import BlockTable, Measurement, protected_blocks
from compress.signals.table import SCORERS_DEFAULT as SCORERS
from compress.signals.table import spearman


def table(*scores: float, sinks: list[list[int]] | None = None) -> BlockTable:
    """Two sequences around each score, the same for all scorers but the last, which is reversed."""
    rows = [[score - 0.5, score + 0.5] for score in scores]
    values = dict.fromkeys(SCORERS, rows) | {SCORERS[-1]: rows[::-1]}
    return BlockTable(values, sinks or [[0, 0]] * len(scores))


def test_means_and_errors_over_sequences() -> None:
    found = table(1, 2, 3.123456789)
    assert found.means("cosine") == [1, 2, 3.12346]
    assert found.errors("cosine") == [0.5, 0.5, 0.5]
    assert BlockTable({"cosine": [[1.0]]}, [[0]]).errors("cosine") == [None]


def test_the_lowest_goes_first_and_ties_by_index() -> None:
    found = table(0, 0, 5, 3, 3, 4, 0)
    assert found.order("cosine") == [3, 4, 5, 2]
    assert found.order("cosine", protect=[]) == [0, 1, 6, 3, 4, 5, 2]
    assert found.order("cosine", protect=[6, 4]) == [0, 1, 3, 5, 2]


def test_who_writes_the_sink_goes_last_of_all() -> None:
    found = table(9, 9, 1, 2, 3, 9, sinks=[[0, 0]] * 2 + [[1, 0]] + [[0, 0]] * 3)
    assert found.order("cosine") == [3, 4, 2]


@pytest.mark.parametrize(
    ("blocks", "protect", "expected"),
    [(6, None, {0, 1, 5}), (2, None, {0, 1}), (1, None, {0}), (6, [], set()), (6, [3], {3})],
)
def test_protected_blocks(blocks: int, protect: list[int] | None, expected: set[int]) -> None:
    assert protected_blocks(blocks, protect) == expected


@pytest.mark.parametrize("block", [-1, 6])
def test_there_must_be_a_block_to_protect(block: int) -> None:
    with pytest.raises(BadInput, match=f"protect: no such block.* got {block}, expected 0 to 5"):
        protected_blocks(6, [block])


def test_spearman_against_its_definition() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(0.9487)  # ties share a rank
    assert spearman([1, 1, 1], [1, 2, 3]) is None


@given(st.lists(st.integers(-50, 50), min_size=3, max_size=12, unique=True))
def test_spearman_sees_order_only(values: list[int]) -> None:
    assert spearman(values, [value**3 for value in values]) == 1


def test_agreement_leaves_protected_blocks_out() -> None:
    agreement = table(0, 0, 1, 2, 3, 0).agreement()
    assert len(agreement) == 6
    assert agreement["knn_entropy/cosine"] == 1
    assert agreement["cosine/norm_ratio"] == -1  # 3, 2, 1 reversed between the protected ones


def test_a_measurement_for_people_and_for_programs() -> None:
    found = Measurement(table(0, 0, 5, 3, 4, 0), protected_blocks(6))
    rows = found.rows()
    assert [len(row) for row in rows] == [len(found.header)] * 6
    assert rows[3] == ("3", *["3 ± 0.5 #1"] * 3, "5 ± 0.5 #3", "")
    assert rows[0][-1] == "protected"
    assert found.orders()["cosine"] == [3, 4, 2]
    assert found.agreeing() == [
        "bucket_entropy/cosine",
        "knn_entropy/bucket_entropy",
        "knn_entropy/cosine",
    ]
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["orders"] == found.orders()
    assert document["values"]["cosine"][2] == [4.5, 5.5]
