"""The distance from the whole model without a healing and with it, against plain copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress.prune.fitness import RemovalLoss
from compress.prune.healing import fit_linear_heal
from compress.prune.healing_loss import healed_kl
from compress.prune.surgery import BlockStack
from compress.prune.units import find_units, without

STACK = BlockStack("model.layers", 6)
REMOVED = frozenset({("attention", 2), ("mlp", 3), ("mlp", 4), ("attention", 5)})


def text(seed: int, sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (sequences, 60), generator=generator)


def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(tokens).logits.double(), 2)


@pytest.fixture
def model(make_family: Callable[..., Any], tmp_path: Path) -> Any:
    """Stored in bfloat16, computed in float32, as a stage does."""
    model = make_family("llama", tmp_path / "float32").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return model.float()


def test_both_distances_are_those_of_plain_copies(model: Any, tmp_path: Path) -> None:
    infos = room.open(tmp_path / "model").tensor_infos()
    parts = find_units(model, "joint").parts
    healed = fit_linear_heal(model, text(1, 24), REMOVED, STACK, parts=parts)
    fresh = text(2, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    before, after = healed_kl(model, fresh, REMOVED, healed, infos, STACK, parts=parts)

    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    [expected] = RemovalLoss(model, fresh, parts=parts)([REMOVED])
    assert before == pytest.approx(expected, rel=1e-4)
    whole, other = log_probabilities(model, fresh), copy.deepcopy(model)
    for name, value in healed.items():
        other.get_parameter(name).data.copy_(value.to(torch.bfloat16))
    with without(other, REMOVED, find_units(other, "joint").parts):
        found = log_probabilities(other, fresh)
    assert after == pytest.approx(float((whole.exp() * (whole - found)).sum(2).mean()), rel=1e-4)
    assert 0 < after < 0.95 * before


def test_nothing_healed_and_what_cannot_be_computed(model: Any, tmp_path: Path) -> None:
    infos = room.open(tmp_path / "model").tensor_infos()
    removed, tokens = [("block", 3)], text(3, 2)
    before, after = healed_kl(model, tokens, removed, {}, infos, STACK)
    assert 0 < before == after
    name = "model.layers.2.mlp.down_proj.weight"
    huge = {name: torch.full((32, 48), 3e38)}
    assert healed_kl(model, tokens, removed, huge, infos, STACK) == (before, math.inf)
    assert model.get_parameter(name).abs().max() < 10
