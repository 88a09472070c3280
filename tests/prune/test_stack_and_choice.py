from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress.errors import BadInput
from compress.prune import check_drop, check_pruned, find_stack, output_without


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i}.{part}" for i in range(count) for part in ("mlp.weight", "norm.weight")]


@pytest.mark.parametrize(
    "prefix", ["model.layers", "h", "transformer.h", "visual.blocks", "bert.encoder.layer"]
)
def test_the_stack_and_its_blocks(prefix: str) -> None:
    stack = find_stack([*names(prefix, 12), "head.weight", "embed.weight"], 12)
    assert stack.prefix == prefix
    assert stack.block(f"{prefix}.11.mlp.weight") == 11
    assert stack.block("head.weight") is None
    assert stack.renumbered(f"{prefix}.11.mlp.weight", 3) == f"{prefix}.3.mlp.weight"


def test_stacks_inside_blocks_and_beside_them_are_not_meant() -> None:
    inner = [f"model.layers.{i}.router.layers.{j}.w" for i in range(3) for j in range(3)]
    vision = names("vision.encoder.layers", 2)
    assert find_stack([*inner, *vision], 3).prefix == "model.layers"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (names("model.layers", 4), r"model\.layers\.3: blocks cannot be removed: there are more"),
        (names("model.layers", 2), r"no single stack of 3 blocks .*got model\.layers \(2\)"),
        (names("model.things", 3), "got none"),
        ([*names("a.layers", 3), *names("b.layers", 3)], r"got a\.layers, b\.layers"),
        ([*names("model.layers", 3), "mtp.proj.weight"], "multi-token prediction"),
    ],
)
def test_names_without_one_stack(tensors: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        find_stack(tensors, 3)


@pytest.mark.parametrize(("blocks", "drop", "protect"), [(6, 4, None), (6, 6, []), (2, 1, None)])
def test_no_more_than_there_are(blocks: int, drop: int, protect: list[int] | None) -> None:
    with pytest.raises(BadInput, match=f"cannot remove {drop} of {blocks} blocks, .*got {drop}"):
        check_drop(blocks, drop, protect)
    check_drop(6, 3)
    check_drop(6, 5, [])


def test_parts_of_two_kinds_are_twice_as_many() -> None:
    check_drop(6, 6, None, 2)
    with pytest.raises(
        BadInput, match="cannot remove 7 of 12 parts of 6 blocks, 3 of them.*most 6"
    ):
        check_drop(6, 7, None, 2)
    check_drop(6, 5, [], 2)
    with pytest.raises(BadInput, match="cannot remove 6 of 12 parts.*at most 5"):
        check_drop(6, 6, [], 2)  # they might be all of a kind


def test_the_proof_sees_one_wrong_bit_and_a_missing_tensor(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    tokens = torch.arange(20)
    expected = output_without(model, tokens, frozenset())
    check_pruned(room.open(tmp_path), tokens, expected)
    expected.view(torch.int32)[3, 5] ^= 1
    with pytest.raises(BadInput, match="llama: .*depends on their positions, got another output"):
        check_pruned(room.open(tmp_path), tokens, expected)
    model.save_pretrained(
        tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "norm" not in k}
    )
    with pytest.raises(BadInput, match="llama: .*depends on their positions, got .*missing"):
        check_pruned(room.open(tmp_path), tokens, expected)


def test_the_proof_knows_what_a_position_is_worth(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    """GPT-2 can scale attention by position: renumbered without a word, it is another model."""
    option = {"scale_attn_by_inverse_layer_idx": True}
    model = make_family("gpt2", tmp_path / "whole", **option)
    tokens = torch.arange(20)
    expected = output_without(model, tokens, frozenset({("block", 1), ("block", 4)}))
    blocks = model.transformer.h
    model.transformer.h = torch.nn.ModuleList(blocks[i] for i in (0, 2, 3, 5))
    model.config.n_layer = 4
    model.save_pretrained(tmp_path / "cut")
    with pytest.raises(BadInput, match="another output from the blocks that stay"):
        check_pruned(room.open(tmp_path / "cut"), tokens, expected)
