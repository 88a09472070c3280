"""Settings of compressed caches, and what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from compress.errors import BadInput
from compress.tokens.cache_policy import CachePolicy

WHOLE = CachePolicy(0.25, 8, 2, "knorm", (1.0, 0.5), ((0, 2), ()), 7)


@pytest.mark.parametrize("policy", [WHOLE, CachePolicy(1.0)])
def test_a_policy_survives_json(policy: CachePolicy) -> None:
    read = CachePolicy.from_json(json.loads(json.dumps(policy.to_json())))
    assert read == policy
    assert hash(read) == hash(policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": 1}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": 0.5, "window": 0}, "window"),
        ({"budget": 0.5, "sinks": -1}, "sinks"),
        ({"budget": 0.5, "seed": True}, "seed"),
        ({"budget": 0.5, "scorer": "snapvk"}, "did you mean 'snapkv'"),
        ({"budget": 0.5, "shares": [1.0, 0.0]}, "shares"),
        ({"budget": 0.5, "shares": 0.3}, "list of layers"),
        ({"budget": 0.5, "head_groups": [0, 1]}, "list of layers"),
        ({"budget": 0.5, "head_groups": [[0.5]]}, "head_groups"),
        ({"budget": 0.5, "windows": 3}, "did you mean 'window'"),
        ({"window": 3}, "'budget' is missing"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        CachePolicy.from_json(settings)
