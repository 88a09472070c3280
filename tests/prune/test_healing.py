"""The map that makes up for removed units, against a plain regression and known linear units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress.errors import BadInput
from compress.prune import check_pruned, find_stack, output_without, remove_blocks
from compress.prune.fitness import Removal, Unit
from compress.prune.healing import apply_heal, fit_linear_heal
from compress.prune.healing_gaps import Gap, find_gaps
from compress.prune.healing_loss import healed_kl
from compress.prune.surgery import BlockStack
from compress.prune.units import find_units
from compress.signals import find_blocks, load_float32, ordinary_tokens, windows

PROJECTIONS = {  # by family: the last projection of a block, and the factor it is added at
    "llama": ("mlp.down_proj", 1),
    "granite": ("mlp.down_proj", 0.25),
    "gpt2": ("mlp.c_proj", 1),
    "gpt_neox": ("mlp.dense_4h_to_h", 1),
    "opt": ("fc2", 1),
    "bloom": ("mlp.dense_4h_to_h", 1),
    "deepseek_v3": ("mlp.down_proj", 1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.25},
    "gpt_neox": {"use_parallel_residual": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 6},
    "deepseek_v3": {"first_k_dense_replace": 5},
}
PREFIXES = {
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}
ATTENTIONS = {  # by family: the last projection of an attention
    "llama": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
}
LAYERS = BlockStack("model.layers", 6)


def blocks_of(*indices: int) -> Removal:
    return frozenset(("block", index) for index in indices)


def text(seed: int, sequences: int = 12, length: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (sequences, length), generator=generator)


def states(model: Any, tokens: torch.Tensor, wanted: Iterable[Any]) -> list[torch.Tensor]:
    """What the ``wanted`` modules give for all of ``tokens`` at once: [sequences, length, d]."""
    found: dict[Any, torch.Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        found[module] = output.view(*tokens.shape, -1).clone()

    hooks = [module.register_forward_hook(keep) for module in wanted]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [found[module] for module in wanted]


@pytest.mark.parametrize(
    ("removed", "gaps"),
    [
        (blocks_of(2), [Gap(1, 2, False)]),
        (blocks_of(1, 2, 4), [Gap(0, 2, False), Gap(3, 4, False)]),
        ([("attention", 1), ("attention", 2)], [Gap(0, 1, True), Gap(1, 2, True)]),
        ([("mlp", 0), ("mlp", 2)], [Gap(0, 0, False), Gap(2, 2, False)]),
        ([("mlp", 1), ("attention", 2)], [Gap(1, 2, True)]),
        ([("attention", 2), ("mlp", 2), ("block", 3), ("attention", 4)], [Gap(1, 4, True)]),
        ([("block", 2), ("mlp", 2)], [Gap(1, 2, False)]),
        ([("attention", 0)], []),
        ([("attention", 0), ("mlp", 0), ("attention", 1), ("mlp", 3)], [Gap(3, 3, False)]),
        ([], []),
    ],
)
def test_units_in_a_row_are_one_gap(removed: Iterable[Unit], gaps: list[Gap]) -> None:
    assert find_gaps(list(removed)) == gaps


def regression(
    x: torch.Tensor, state: torch.Tensor, target: torch.Tensor, ridge: float
) -> torch.Tensor:
    """The minimum by least squares, with rows added for the prior and for the other tokens."""
    keep = torch.stack(
        [
            ordinary_tokens(s, t, torch.ones(len(s), dtype=torch.bool))
            for s, t in zip(state, target, strict=True)
        ]
    )
    x, idle = x[keep].double(), x[~keep].double()
    y = x + (target - state)[keep].double()
    prior = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(32).double()
    idle *= x.norm() / idle.norm()
    return torch.linalg.lstsq(torch.cat([x, prior, idle]), torch.cat([y, prior, idle])).solution


def check_folded(
    healed: dict[str, torch.Tensor], name: str, last: Any, change: torch.Tensor
) -> None:
    """Nothing but the parameters of ``last``, its output times ``change``."""
    old = last.weight.detach().double()
    conv = type(last).__name__ == "Conv1D"
    expected = {"weight": old @ change if conv else change.T @ old}
    if last.bias is not None:
        expected["bias"] = last.bias.detach().double() @ change
    assert healed.keys() == {f"{name}.{part}" for part in expected}
    for part, value in expected.items():
        torch.testing.assert_close(healed[f"{name}.{part}"], value.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_one_gap_is_a_ridge_regression_over_the_whole_batch(
    family: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    """The same minimum from a batched pass."""
    model = make_family(family, tmp_path, **OPTIONS.get(family, {}))
    tokens, ridge = text(1), 0.5
    stack = find_stack(room.open(tmp_path).tensor_infos(), 6)
    assert stack.prefix == PREFIXES.get(family, "model.layers")
    name, factor = PROJECTIONS[family]
    blocks = find_blocks(model)
    last = blocks[1].get_submodule(name)
    if last.bias is not None:
        torch.nn.init.normal_(last.bias)
    x, state, target = states(model, tokens, [last, blocks[1], blocks[3]])

    healed = fit_linear_heal(model, tokens, blocks_of(2, 3), stack, ridge=ridge)

    change = regression(factor * x, state, target, ridge)
    check_folded(healed, f"{stack.prefix}.1.{name}", last, change)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("family", ATTENTIONS)
def test_a_gap_within_a_block_is_one_as_well(
    family: str, kind: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    """An attention's part goes into the MLP before it, an MLP's into its block's attention."""
    model = make_family(family, tmp_path, **OPTIONS.get(family, {}))
    tokens = text(1)
    stack = find_stack(room.open(tmp_path).tensor_infos(), 6)
    parts = find_units(model, "joint").parts
    before, name = (2, ATTENTIONS[family]) if kind == "mlp" else (1, PROJECTIONS[family][0])
    blocks = find_blocks(model)
    last = blocks[before].get_submodule(name)
    if last.bias is not None:
        torch.nn.init.normal_(last.bias)
    wanted = [last, blocks[1], blocks[2], parts["attention", 2]]
    x, entered, left, attended = states(model, tokens, wanted)

    healed = fit_linear_heal(model, tokens, {(kind, 2)}, stack, parts=parts, ridge=0.5)

    middle = entered + attended
    state, target = (middle, left) if kind == "mlp" else (entered, middle)
    check_folded(healed, f"{stack.prefix}.{before}.{name}", last, regression(x, state, target, 0.5))


class Linear(torch.nn.Module):
    """A unit that gives a linear function of what a projection gave for the same tokens."""

    def __init__(self, model: Any, kind: str, projection: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.change = torch.randn(32, 32) / 6
        self.kind, self.seen, self.tokens = kind, dict[bytes, torch.Tensor](), b""
        model.get_input_embeddings().register_forward_hook(self._begin)
        projection.register_forward_hook(self._see)

    def _begin(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.tokens = args[0].numpy().tobytes()

    def _see(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.seen[self.tokens] = output

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        given = self.seen[self.tokens] @ self.change
        if self.kind == "attention":
            return given, None
        return hidden_states + given if self.kind == "block" else given


DOWN, OUT = "mlp.down_proj", "self_attn.o_proj"


@pytest.mark.parametrize(
    "gaps",
    [
        {(0, DOWN): [("block", 1)], (3, DOWN): [("block", 4)]},
        {(0, DOWN): [("attention", 1)], (3, DOWN): [("attention", 4)]},
        {(1, OUT): [("mlp", 1)], (2, OUT): [("mlp", 2)]},
        {(0, OUT): [("mlp", 0), ("attention", 1)], (1, DOWN): [("attention", 2), ("mlp", 2)]},
        {(1, OUT): [("mlp", 1), ("block", 2), ("attention", 3)], (4, OUT): [("mlp", 4)]},
    ],
)
def test_linear_units_are_replaced_exactly_gap_after_gap(
    gaps: dict[tuple[int, str], list[Unit]], make_family: Callable[..., Any], tmp_path: Path
) -> None:
    """The second gap's is exact only in a stream whose first gap is healed.

    All units give nothing for a sequence's first token, always the same one.
    """
    model = make_family("llama", tmp_path)
    layers, tokens = model.model.layers, text(3)
    tokens[:, 0] = 5
    expected = {}
    for (before, name), units in gaps.items():
        last = layers[before].get_submodule(name)
        [given] = states(model, tokens[:1], [last])
        first = given[0, 0] / given[0, 0].norm()
        total = torch.eye(32)
        for kind, index in units:
            unit = Linear(model, kind, last, len(expected) + index)
            unit.change -= torch.outer(first, first @ unit.change)
            total += unit.change
            if kind == "block":
                layers[index] = unit
            else:
                setattr(layers[index], {"attention": "self_attn"}.get(kind, kind), unit)
        expected[f"model.layers.{before}.{name}.weight"] = total.T @ last.weight.detach()
    removed = frozenset(unit for units in gaps.values() for unit in units)
    parts = {
        (kind, index): getattr(layers[index], {"attention": "self_attn"}.get(kind, kind))
        for kind, index in removed
        if kind != "block"
    }
    whole = output_without(model, tokens[0], frozenset())

    healed = fit_linear_heal(model, tokens, removed, LAYERS, parts=parts, ridge=1e-9, threads=1)

    assert healed.keys() == expected.keys()
    for tensor, value in expected.items():
        torch.testing.assert_close(healed[tensor], value, rtol=1e-3, atol=1e-3)
        model.get_parameter(tensor).data.copy_(healed[tensor])
    found = output_without(model, tokens[0], removed, parts)
    torch.testing.assert_close(found, whole, rtol=0, atol=3e-3)


def test_what_is_left_out_of_the_fit_is_left_alone(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    tokens = text(2)
    tokens[:, 0] = 5
    last = model.model.layers[1].mlp.down_proj
    [before] = states(model, tokens, [last])
    infos = room.open(tmp_path).tensor_infos()
    apply_heal(
        model, fit_linear_heal(model, tokens, blocks_of(2, 3), LAYERS, ridge=1e-2), infos, LAYERS
    )
    [after] = states(model, tokens, [last])
    changed = (after - before).norm(dim=2) / before.norm(dim=2)
    assert changed[:, 1:].mean() > 0.5
    assert changed[:, 0].max() < 0.1


class Tupled(torch.nn.Module):
    """A block of those that return more than the state, of which a hook makes what others do."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.mlp, self.block = block.mlp, [block]
        self.register_forward_hook(self.unpack)

    def forward(self, state: torch.Tensor, **options: Any) -> Any:
        return self.block[0](state, **options), "weights"

    def unpack(self, module: Any, args: Any, output: Any) -> torch.Tensor:
        state, _ = output
        return state


def test_blocks_that_return_tuples(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("llama", tmp_path)
    plain = fit_linear_heal(model, text(3), blocks_of(2, 4), LAYERS)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Tupled(block)
    tupled = fit_linear_heal(model, text(3), blocks_of(2, 4), LAYERS)
    assert len(plain) == 2
    assert all(tupled[name].equal(plain[name]) for name in plain)


def error_without(model: Any, tokens: torch.Tensor, whole: list[torch.Tensor]) -> float:
    outputs = [output_without(model, row, blocks_of(2, 4)) for row in tokens]
    return float(sum((a - b)[1:].square().sum() for a, b in zip(outputs, whole, strict=True)))


def test_healing_helps_on_text_it_has_not_seen(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    checkpoint = room.open(tmp_path)
    fresh = text(4)
    whole = [output_without(model, row, frozenset()) for row in fresh]
    unhealed = error_without(model, fresh, whole)
    infos = checkpoint.tensor_infos()
    apply_heal(model, fit_linear_heal(model, text(5, 32), blocks_of(2, 4), LAYERS), infos, LAYERS)
    assert error_without(model, fresh, whole) < 0.9 * unhealed


def test_the_model_stays_as_it_was_and_threads_change_no_bit(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    own = model.model.layers[3].forward = model.model.layers[3].forward  # as accelerate does
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    parts = find_units(model, "joint").parts
    removed = [("block", 2), ("attention", 4), ("mlp", 5)]
    before = output_without(model, text(6)[0], frozenset())
    one, three = (
        fit_linear_heal(model, text(6), removed, LAYERS, parts=parts, threads=threads)
        for threads in (1, 3)
    )
    assert all(three[name].equal(one[name]) for name in one)
    assert output_without(model, text(6)[0], frozenset()).equal(before)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert [i for i, b in enumerate(model.model.layers) if "forward" in vars(b)] == [3]
    assert model.model.layers[3].forward is own


def test_a_strong_prior_and_a_silent_projection_change_nothing(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    name = "model.layers.2.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    [strong] = fit_linear_heal(model, text(7), blocks_of(3), LAYERS, ridge=1e9).values()
    torch.testing.assert_close(strong, weight.detach())
    weak = fit_linear_heal(model, text(7), blocks_of(3), LAYERS, ridge=1e-2)[name]
    assert (weak - weight).norm() > 0.1 * weight.norm()
    weight.data.zero_()
    assert not fit_linear_heal(model, text(7), blocks_of(3), LAYERS)[name].any()


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "mixtral", "qwen3_moe"])
def test_norms_and_experts_after_the_projection_are_refused(
    family: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family(family, tmp_path)
    with pytest.raises(BadInput, match="block 1 of .*cannot be healed: its last projection is not"):
        fit_linear_heal(model, text(8), blocks_of(2), LAYERS)


def test_what_cannot_be_healed(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("llama", tmp_path)
    with pytest.raises(BadInput, match="block 0 cannot be healed: nothing is left before it"):
        fit_linear_heal(model, text(8), blocks_of(0, 3), LAYERS)
    with pytest.raises(BadInput, match="block 1 cannot be healed: nothing is left before it"):
        find_gaps([("attention", 0), ("mlp", 0), ("block", 1)])
    with pytest.raises(BadInput, match="positive ridge, got 0"):
        fit_linear_heal(model, text(8), blocks_of(3), LAYERS, ridge=0)
    with pytest.raises(BadInput, match="token 97, expected less than vocab_size 97"):
        fit_linear_heal(model, text(8) + 1, blocks_of(3), LAYERS)
    model.model.layers[4].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(BadInput, match="block 2: activations are not finite"):
        fit_linear_heal(model, text(8), blocks_of(3, 4), LAYERS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_healed_files_are_the_healed_model(
    dtype: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("gpt2", tmp_path / "whole").to(getattr(torch, dtype))
    torch.nn.init.normal_(model.transformer.h[1].mlp.c_proj.bias)
    model.save_pretrained(tmp_path / "model")
    original = room.open(tmp_path / "model")
    infos = original.tensor_infos()
    stack = find_stack(infos, 6)
    model = load_float32(original)
    healed = fit_linear_heal(model, text(9), blocks_of(2, 3), stack)
    apply_heal(model, healed, infos, stack)
    expected = output_without(model, text(9)[0], blocks_of(2, 3))

    pruned, renamed, removed = remove_blocks(original, (2, 3), tmp_path / "pruned", replace=healed)

    check_pruned(pruned, text(9)[0], expected)
    places = {renamed.get(name, name): name for name in pruned.tensor_infos()}
    for name, info in infos.items():
        if name not in removed:
            changed = not pruned.read(places[name]).equal(original.read(name))
            assert changed == (name in healed)
            assert pruned.tensor_infos()[places[name]].dtype == info.dtype


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.9.x", torch.zeros(1), "model.layers.9.x: cannot replace a tensor"),
        ("model.norm.weight", torch.zeros(3), r"got \[3\], expected F32 \[32\]"),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(48, 32), "tensor of a removed block"),
        ("model.norm.weight", torch.full((32,), float("inf")), "not finite in F32"),
    ],
)
def test_replacements_without_a_place(
    name: str,
    value: torch.Tensor,
    message: str,
    make_family: Callable[..., Any],
    tmp_path: Path,
) -> None:
    make_family("llama", tmp_path / "model")
    with pytest.raises(BadInput, match=message):
        remove_blocks(
            room.open(tmp_path / "model"), (2,), tmp_path / "pruned", replace={name: value}
        )
    assert not (tmp_path / "pruned").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "removed",
    [
        blocks_of(14, 25),
        blocks_of(7, 12),  # block 11 writes a sink, which must stay
        frozenset({("attention", 25), ("attention", 26)}),
    ],
)
def test_a_fifth_of_the_damage_to_smollm2_is_undone(removed: Removal) -> None:
    try:
        original = room.open(room.resolve("demo:smollm2-135m"))
    except Exception as error:
        pytest.skip(str(error))
    model, tokenizer = load_float32(original), original.tokenizer()
    infos = original.tensor_infos()
    stack = find_stack(infos, 30)
    parts = find_units(model, "joint").parts
    rows = windows("builtin:calibration", tokenizer, 8, 256, 0)
    healed = fit_linear_heal(model, rows, removed, stack, parts=parts)
    unseen = windows("builtin:heldout", tokenizer, 4, 256, 0)
    before, after = healed_kl(model, unseen, removed, healed, infos, stack, parts=parts)
    assert after < 0.8 * before
