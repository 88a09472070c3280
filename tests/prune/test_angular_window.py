from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import BadInput
from compress.prune.angular_window import window_angular
from compress.signals import find_blocks

TOKENS = torch.arange(3 * 40).reshape(3, 40) * 7 % 97


@pytest.fixture(scope="module")
def llama(make_family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("n", [1, 3, 6])
def test_it_is_the_angle_at_the_last_token(n: int, llama: Any) -> None:
    states = []
    hook = find_blocks(llama)[5].register_forward_hook(lambda m, a, output: states.append(output))
    with torch.no_grad():
        inner = llama(TOKENS, output_hidden_states=True).hidden_states[:-1]  # the last is normed
    hook.remove()
    path = [state[:, -1].double() for state in (*inner, states[0])]
    expected = [
        float((torch.cosine_similarity(a, b, dim=1).arccos() / math.pi).mean())
        for a, b in zip(path[:-n], path[n:], strict=True)
    ]
    found = window_angular(llama, TOKENS, n)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(found) == 7 - n


def test_it_knows_blocks_that_do_nothing(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("llama", tmp_path)
    for i in (2, 3):
        block = find_blocks(model)[i]
        block.mlp.down_proj.weight.data.zero_()
        block.self_attn.o_proj.weight.data.zero_()
    distances = window_angular(model, TOKENS, 2)
    assert distances.index(min(distances)) == 2
    assert distances[2] < 1e-7 < sorted(distances)[1]


def test_the_model_is_left_as_it_was(llama: Any) -> None:
    def hooks() -> list[int]:
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llama.modules()]

    logits, before = llama(TOKENS).logits, hooks()
    window_angular(llama, TOKENS, 2)
    assert hooks() == before
    assert torch.equal(llama(TOKENS).logits, logits)


def test_a_state_that_is_not_finite(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("llama", tmp_path)
    find_blocks(model)[4].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="activations are not finite"):
        window_angular(model, TOKENS, 2)


@pytest.mark.parametrize("n", [0, 7])
def test_no_such_window(n: int, llama: Any) -> None:
    with pytest.raises(BadInput, match="no window of so many blocks, got .*expected 1 to 6"):
        window_angular(llama, TOKENS, n)
