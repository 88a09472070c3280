"""What may go of a model, what it saves, and the model without it, against plain counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress import codec, stages
from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.prune import (
    KINDS,
    MEASURES,
    drop_sublayers,
    find_units,
    output_without,
    remove_blocks,
    savings,
    without,
)
from compress.signals import find_blocks
from compress.stages import Workspace

D, MLP, VOCABULARY, BLOCKS = 32, 48, 97, 6
TOKENS = 24
# By family the modules of a block and the numbers in its attention, MLP and norms, biases included.
GPT_MLP = 4 * D
FAMILIES: dict[str, tuple[str, str, int, int, int]] = {
    "llama": ("self_attn", "mlp", 2 * D * D + 2 * D * D // 2, 3 * D * MLP, 2 * D),
    "gpt2": (
        *("attn", "mlp"),
        4 * D * D + 4 * D,
        2 * D * GPT_MLP + GPT_MLP + D,
        4 * D,
    ),
    "gpt_neox": ("attention", "mlp", 4 * D * D + 4 * D, 2 * D * MLP + MLP + D, 4 * D),
}


@pytest.fixture(scope="module")
def family(
    make_family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Checkpoint]]:
    made: dict[str, tuple[Any, Checkpoint]] = {}

    def get(name: str) -> tuple[Any, Checkpoint]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = make_family(name, directory), room.open(directory)
        return made[name]

    return get


Family = Callable[[str], tuple[Any, Checkpoint]]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_units_of_a_family(name: str, family: Family) -> None:
    model, _ = family(name)
    blocks = find_blocks(model)
    attention, mlp, *_ = FAMILIES[name]
    child = {"attention": attention, "mlp": mlp}
    for granularity, kinds in KINDS.items():
        units = find_units(model, granularity)
        assert (units.kinds, units.blocks) == (kinds, BLOCKS)
        assert units.free() == [(kind, i) for kind in kinds for i in (2, 3, 4)]
        assert units.free([0, 5]) == [(kind, i) for kind in kinds for i in (1, 2, 3, 4)]
        parts = kinds if granularity != "block" else ()
        assert set(units.parts) == {(kind, i) for kind in parts for i in range(BLOCKS)}
        for (kind, i), module in units.parts.items():
            assert module is getattr(blocks[i], child[kind])
        for kind in kinds:
            scored = units.to_score(model, kind)
            if kind == "block":
                assert scored is None
                continue
            assert scored is not None
            assert [part.module for part in scored] == [getattr(b, child[kind]) for b in blocks]
            first = kind == "mlp" and name != "gpt_neox"  # whose MLP reads what its attention does
            assert [part.before for part in scored] == [
                getattr(block, attention) if first else None for block in blocks
            ]


def test_a_sandwich_norm_belongs_to_the_part(make_family: Any, tmp_path: Path) -> None:
    model = make_family("gemma2", tmp_path)
    units = find_units(model, "joint")
    assert units.parts["attention", 1] is find_blocks(model)[1].post_attention_layernorm
    assert units.parts["mlp", 1] is find_blocks(model)[1].post_feedforward_layernorm


def test_no_such_granularity(family: Family) -> None:
    with pytest.raises(BadInput, match="no such granularity, got mpl; did you mean 'mlp'"):
        find_units(family("llama")[0], "mpl")


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_counted_by_hand(name: str, family: Family) -> None:
    model, checkpoint = family(name)
    _, _, attention, mlp, norms = FAMILIES[name]
    every = sum(parameter.numel() for parameter in model.parameters())
    saved, total = savings("parameters", model, checkpoint, find_units(model, "block"), TOKENS)
    assert saved == {("block", i): attention + mlp + norms for i in range(BLOCKS)}
    assert total == every
    saved, total = savings("parameters", model, checkpoint, find_units(model, "joint"), TOKENS)
    expected = {("attention", i): attention for i in range(BLOCKS)}
    assert saved == expected | {("mlp", i): mlp for i in range(BLOCKS)}
    assert total == every


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_two_a_weight_and_token_and_those_of_attention(name: str, family: Family) -> None:
    model, checkpoint = family(name)
    attention, mlp = {
        "llama": (3 * D * D, 3 * D * MLP),
        "gpt2": (4 * D * D, 2 * D * GPT_MLP),
        "gpt_neox": (4 * D * D, 2 * D * MLP),
    }[name]
    scores = 2 * 2 * TOKENS * TOKENS * D  # each query with each key, each share with each value
    attention, mlp = 2 * attention * TOKENS + scores, 2 * mlp * TOKENS
    blocks, total = savings("flops", model, checkpoint, find_units(model, "block"), TOKENS)
    assert blocks == {("block", i): attention + mlp for i in range(BLOCKS)}
    assert total == BLOCKS * (attention + mlp) + 2 * D * VOCABULARY * TOKENS  # the head
    parts, again = savings("flops", model, checkpoint, find_units(model, "joint"), TOKENS)
    assert parts == {(kind, i): attention if kind == "attention" else mlp for kind, i in parts}
    assert again == total
    only, again = savings("flops", model, checkpoint, find_units(model, "mlp"), TOKENS)
    assert only == {("mlp", i): mlp for i in range(BLOCKS)}


def test_flops_of_experts_are_those_of_the_ones_that_run(make_family: Any, tmp_path: Path) -> None:
    model = make_family("mixtral", tmp_path)
    saved, _ = savings("flops", model, room.open(tmp_path), find_units(model, "mlp"), TOKENS)
    experts, running = 4, 2
    assert saved["mlp", 3] == 2 * TOKENS * (running * 3 * D * MLP + experts * D)


def test_flops_of_an_mlp_without_a_module_of_its_own(make_family: Any, tmp_path: Path) -> None:
    model = make_family("opt", tmp_path, ffn_dim=MLP, word_embed_proj_dim=D)
    saved, _ = savings("flops", model, room.open(tmp_path), find_units(model, "mlp"), TOKENS)
    assert saved["mlp", 3] == 2 * TOKENS * 2 * D * MLP


def coded_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    return {
        name: sum(
            memoryview(piece).nbytes
            for piece in codec.encode(name, info.dtype, info.shape, checkpoint.chunks(name))
        )
        for name, info in checkpoint.tensor_infos().items()
    }


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama_tied"])
def test_coded_bytes_are_those_that_coding_gives(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = room.open(request.getfixturevalue(model))
    loaded = checkpoint.load_model(dtype="float32")
    sizes = coded_sizes(checkpoint)
    blocks, total = savings("coded_bytes", loaded, checkpoint, find_units(loaded, "block"), 8)
    parts, again = savings("coded_bytes", loaded, checkpoint, find_units(loaded, "joint"), 8)
    assert total == again == sum(sizes.values())
    for i in range(BLOCKS):
        prefix = f"model.layers.{i}."
        assert blocks["block", i] == sum(n for name, n in sizes.items() if name.startswith(prefix))
        for kind, child in (("attention", "self_attn."), ("mlp", "mlp.")):
            of = [n for name, n in sizes.items() if name.startswith(prefix + child)]
            assert parts[kind, i] == sum(of) > 0
    assert len({*blocks.values()}) > 1  # random blocks differ a little
    encode = stages.get("encode_weights")
    coded, _ = encode.run(checkpoint, encode.Config(), Workspace(tmp_path / "coded"))
    assert total == sum(info.stored_nbytes for info in coded.tensor_infos().values())


@pytest.mark.parametrize("measure", ["parameters", "coded_bytes"])
def test_sizes_of_a_coded_checkpoint_are_those_of_the_plain_one(
    measure: str, tiny_llama: Path, tmp_path: Path
) -> None:
    plain = room.open(tiny_llama)
    encode = stages.get("encode_weights")
    coded, _ = encode.run(plain, encode.Config(), Workspace(tmp_path / "coded"))
    model = plain.load_model(dtype="float32")
    units = find_units(model, "joint")
    assert savings(measure, model, coded, units, 8) == savings(measure, model, plain, units, 8)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", [*FAMILIES, "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_parts_are_no_more_than_blocks_and_blocks_no_more_than_all(
    name: str, measure: str, family: Family
) -> None:
    model, checkpoint = family(name)
    found = {g: savings(measure, model, checkpoint, find_units(model, g), TOKENS) for g in KINDS}
    blocks, total = found["block"]
    assert len({whole for _, whole in found.values()}) == 1
    assert 0 < sum(blocks.values()) < total
    joint, _ = found["joint"]
    assert joint == {**found["attention"][0], **found["mlp"][0]}
    for i in range(BLOCKS):
        both = joint["attention", i] + joint["mlp", i]
        assert min(joint["attention", i], joint["mlp", i]) > 0
        assert both == blocks["block", i] if measure == "flops" else both < blocks["block", i]


def test_what_is_removed_shows_in_the_files(family: Family, tmp_path: Path) -> None:
    """The savings are what the surgery takes, in numbers and in coded bytes."""
    model, checkpoint = family("gpt2")
    for measure in ("parameters", "coded_bytes"):
        saved, total = savings(measure, model, checkpoint, find_units(model, "block"), TOKENS)
        pruned, *_ = remove_blocks(checkpoint, (1, 4), tmp_path / measure)
        left = (
            sum(coded_sizes(pruned).values())
            if measure == "coded_bytes"
            else sum(info.nbytes // 4 for info in pruned.tensor_infos().values())
        )
        assert left == total - saved["block", 1] - saved["block", 4]
    saved, _ = savings("parameters", model, checkpoint, find_units(model, "joint"), TOKENS)
    dropped, zeroed = drop_sublayers(checkpoint, (2,), (3,), tmp_path / "dropped")
    zeros = sum(dropped.tensor_infos()[name].nbytes // 4 for name in zeroed)
    assert zeros == saved["attention", 2] + saved["mlp", 3]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_model_without_units_and_whole_again(name: str, family: Family) -> None:
    model, _ = family(name)
    units = find_units(model, "joint")
    tokens = torch.arange(TOKENS)
    nothing = frozenset[Any]()
    whole = output_without(model, tokens, nothing)
    both = output_without(model, tokens, frozenset({("attention", 2), ("mlp", 2)}), units.parts)
    block = output_without(model, tokens, frozenset({("block", 2)}))
    torch.testing.assert_close(both, block, rtol=1e-5, atol=1e-5)
    assert not torch.equal(both, whole)
    one, other = (
        output_without(model, tokens, frozenset({unit}), units.parts)
        for unit in (("attention", 2), ("mlp", 2))
    )
    assert not torch.equal(one, both)
    assert not torch.equal(one, other)
    every = output_without(model, tokens, frozenset(units.parts), units.parts)
    stripped = output_without(model, tokens, frozenset(("block", i) for i in range(BLOCKS)))
    assert torch.equal(every, stripped)
    assert torch.equal(output_without(model, tokens, nothing), whole)


def test_zeroing_the_projections_is_the_same(make_family: Any, tmp_path: Path) -> None:
    model = make_family("gemma2", tmp_path)
    tokens, units = torch.arange(12)[None], find_units(model, "joint")
    with torch.no_grad():
        with without(model, frozenset({("attention", 2)}), units.parts):
            found = model(tokens).logits
        whole = model(tokens).logits
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        assert torch.equal(model(tokens).logits, found)
    assert not torch.equal(found, whole)


def test_whole_again_after_an_error(family: Family) -> None:
    model, _ = family("llama")
    tokens = torch.arange(12)
    whole = output_without(model, tokens, frozenset())
    with pytest.raises(RuntimeError), without(model, frozenset({("block", 2)})):
        raise RuntimeError
    assert torch.equal(output_without(model, tokens, frozenset()), whole)
