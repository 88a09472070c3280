from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.tokens.policy import TokenPolicy


def test_json_and_back() -> None:
    policies = [
        TokenPolicy(2, 1 / 3, "logdet", options={"alpha": 3.5}, seed=7),
        TokenPolicy(1, 64, "random", target="text", sinks=0, recent=8),
    ]
    for policy in policies:
        text = json.dumps(policy.to_json())
        assert TokenPolicy.from_json(json.loads(text)) == policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 2}, "unknown setting 'layers'.*did you mean 'layer'"),
        ({"layer": 0}, "layer: cannot be, got 0.*before layer 0 nothing can go"),
        ({"layer": True}, "layer"),
        ({"keep": 0.0}, r"keep.*\(0, 1\]"),
        ({"keep": 1.5}, "keep"),
        ({"keep": 0}, "keep"),
        ({"keep": True}, "keep"),
        ({"keep": math.nan}, "keep"),
        ({"target": "visuals"}, "target.*did you mean 'visual'"),
        ({"seed": -1}, "seed"),
        ({"recent": 0}, "recent"),
        ({"selector": None}, "selector"),
        ({"options": ["alpha"]}, "options"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        TokenPolicy.from_json({"layer": 2, "keep": 0.5, "selector": "uniform", **settings})


def test_what_must_be_there() -> None:
    with pytest.raises(BadInput, match="'keep' is missing"):
        TokenPolicy.from_json({"layer": 2, "selector": "uniform"})


@given(st.integers(1, 5000), st.integers(1, 100))
def test_shares_are_rounded_up_and_never_to_none(tokens: int, percent: int) -> None:
    kept = TokenPolicy(1, percent / 100, "uniform").count(tokens)
    assert kept == max(1, -(-tokens * percent // 100))


def test_numbers_are_numbers_of_tokens() -> None:
    assert [TokenPolicy(1, 3, "uniform").count(n) for n in (1, 2, 3, 400)] == [1, 2, 3, 3]
    assert TokenPolicy(1, 1, "uniform").count(400) == 1
    assert TokenPolicy(1, 1.0, "uniform").count(400) == 400
