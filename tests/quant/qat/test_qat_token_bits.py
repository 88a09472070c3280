from __future__ import annotations

import pytest
import torch

from compress.errors import BadInput
from compress.quant.qat.token_bits import TokenBits, important_tokens


def maps(tokens: int, seed: int = 0) -> torch.Tensor:
    scores = torch.randn(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("threshold", [0.4, 0.7, 1.0])
def test_later_tokens_make_no_difference(threshold: float) -> None:
    """One token at a time has the widths that the whole sequence has."""
    whole = maps(30)
    found = important_tokens(whole, threshold)
    for length in range(1, 31):
        part = important_tokens(whole[..., :length, :length], threshold)
        assert part.equal(found[:, :length])
    assert 0 < found.double().mean() < 1


def test_by_hand() -> None:
    attention = torch.zeros(1, 2, 4, 4)
    attention[0, 0, :, 0] = torch.tensor([1.0, 0.8, 0.1, 0.9])
    attention[0, 1, :, 0] = torch.tensor([1.0, 0.6, 0.3, 0.5])
    # means over heads 1, .7, .2, .7; means so far 1, .85, .633, .65
    assert important_tokens(attention, 1.0).tolist() == [[True, False, False, True]]
    assert important_tokens(attention, 0.8).tolist() == [[True, True, False, True]]
    assert important_tokens(attention, 0.0).all()
    assert important_tokens(attention, 1.1).tolist() == [[False] * 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1}, "token_bits.low: no such width, got 1, expected 2 to 8"),
        ({"threshold": float("nan")}, "token_bits.threshold: no such threshold, got nan"),
    ],
)
def test_bad_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        TokenBits(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
