"""The map that makes up for removed blocks, against a plain regression and known linear blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress.errors import BadInput
from compress.prune import check_pruned, find_stack, output_without, remove_blocks
from compress.prune.healing import apply_heal, fit_linear_heal
from compress.prune.surgery import BlockStack
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
LAYERS = BlockStack("model.layers", 6)


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


@pytest.mark.parametrize("family", PROJECTIONS)
def test_one_gap_is_a_ridge_regression_over_the_whole_batch(
    family: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    """The same minimum by least squares with rows added for the prior, and a batched pass."""
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
    keep = torch.stack(
        [
            ordinary_tokens(s, t, torch.ones(len(s), dtype=torch.bool))
            for s, t in zip(state, target, strict=True)
        ]
    )
    x = factor * x[keep].double()
    y = x + (target - state)[keep].double()
    weight = (ridge * x.square().sum(0).mean()).sqrt() * torch.eye(32).double()
    change = torch.linalg.lstsq(torch.cat([x, weight]), torch.cat([y, weight])).solution

    healed = fit_linear_heal(model, tokens, (2, 3), stack, ridge=ridge)

    conv = type(last).__name__ == "Conv1D"
    old = last.weight.detach().double()
    expected = {"weight": old @ change if conv else change.T @ old}
    if last.bias is not None:
        expected["bias"] = last.bias.detach().double() @ change
    assert healed.keys() == {f"{stack.prefix}.1.{name}.{part}" for part in expected}
    for part, value in expected.items():
        torch.testing.assert_close(
            healed[f"{stack.prefix}.1.{name}.{part}"], value.float(), rtol=1e-3, atol=1e-4
        )


class Linear(torch.nn.Module):
    """A block that adds a linear function of what a projection gave."""

    def __init__(self, projection: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.change = torch.randn(32, 32) / 6
        projection.register_forward_hook(self._see)

    def _see(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.seen = output

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        return hidden_states + self.seen @ self.change


def test_linear_blocks_are_replaced_exactly_gap_after_gap(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    """The second gap's is exact only in a stream whose first gap is healed."""
    model = make_family("llama", tmp_path)
    layers = model.model.layers
    linear = {b: Linear(layers[b - 1].mlp.down_proj, b) for b in (1, 4)}
    for block, module in linear.items():
        layers[block] = module
    before = {b: layers[b - 1].mlp.down_proj.weight.detach().clone() for b in linear}
    tokens = text(2)
    whole = output_without(model, tokens[0], ())

    healed = fit_linear_heal(model, text(3), linear, LAYERS, ridge=1e-9, threads=1)

    assert len(healed) == 2
    for block, module in linear.items():
        found = healed[f"model.layers.{block - 1}.mlp.down_proj.weight"]
        expected = (torch.eye(32) + module.change).T @ before[block]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        layers[block - 1].mlp.down_proj.weight.data.copy_(found)
    torch.testing.assert_close(output_without(model, tokens[0], (1, 4)), whole, rtol=0, atol=1e-3)


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
    plain = fit_linear_heal(model, text(3), (2, 4), LAYERS)
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Tupled(block)
    tupled = fit_linear_heal(model, text(3), (2, 4), LAYERS)
    assert len(plain) == 2
    assert all(tupled[name].equal(plain[name]) for name in plain)


def error_without(model: Any, tokens: torch.Tensor, whole: list[torch.Tensor]) -> float:
    outputs = [output_without(model, row, (2, 4)) for row in tokens]
    return float(sum((a - b)[1:].square().sum() for a, b in zip(outputs, whole, strict=True)))


def test_healing_helps_on_text_it_has_not_seen(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    checkpoint = room.open(tmp_path)
    fresh = text(4)
    whole = [output_without(model, row, ()) for row in fresh]
    unhealed = error_without(model, fresh, whole)
    infos = checkpoint.tensor_infos()
    apply_heal(model, fit_linear_heal(model, text(5, 32), (2, 4), LAYERS), infos, LAYERS)
    assert error_without(model, fresh, whole) < 0.9 * unhealed


def test_the_model_stays_as_it_was_and_threads_change_no_bit(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    own = model.model.layers[3].forward = model.model.layers[3].forward  # as accelerate does
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = output_without(model, text(6)[0], ())
    one, three = (
        fit_linear_heal(model, text(6), (2, 4), LAYERS, threads=threads) for threads in (1, 3)
    )
    assert all(three[name].equal(one[name]) for name in one)
    assert output_without(model, text(6)[0], ()).equal(before)
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
    assert [i for i, b in enumerate(model.model.layers) if "forward" in vars(b)] == [3]
    assert model.model.layers[3].forward is own


def test_a_strong_prior_and_a_silent_projection_change_nothing(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family("llama", tmp_path)
    name = "model.layers.2.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    [strong] = fit_linear_heal(model, text(7), (3,), LAYERS, ridge=1e9).values()
    torch.testing.assert_close(strong, weight.detach())
    weak = fit_linear_heal(model, text(7), (3,), LAYERS, ridge=1e-2)[name]
    assert (weak - weight).norm() > 0.1 * weight.norm()
    weight.data.zero_()
    assert not fit_linear_heal(model, text(7), (3,), LAYERS)[name].any()


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "mixtral", "qwen3_moe"])
def test_norms_and_experts_after_the_projection_are_refused(
    family: str, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_family(family, tmp_path)
    with pytest.raises(BadInput, match="block 1 of .*cannot be healed: its last projection is not"):
        fit_linear_heal(model, text(8), (2,), LAYERS)


def test_what_cannot_be_healed(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("llama", tmp_path)
    with pytest.raises(BadInput, match="block 0 cannot be healed"):
        fit_linear_heal(model, text(8), (0, 3), LAYERS)
    with pytest.raises(BadInput, match="positive ridge, got 0"):
        fit_linear_heal(model, text(8), (3,), LAYERS, ridge=0)
    with pytest.raises(BadInput, match="token 97, expected less than vocab_size 97"):
        fit_linear_heal(model, text(8) + 1, (3,), LAYERS)
    model.model.layers[4].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(BadInput, match="block 2: activations are not finite"):
        fit_linear_heal(model, text(8), (3, 4), LAYERS)


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
    healed = fit_linear_heal(model, text(9), (2, 3), stack)
    apply_heal(model, healed, infos, stack)
    expected = output_without(model, text(9)[0], (2, 3))

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
def test_a_fifth_of_the_damage_to_smollm2_is_undone() -> None:
    from compress.evaluate import losses, perplexity, read_documents

    try:
        original = room.open(room.resolve("demo:smollm2-135m"))
    except Exception as error:
        pytest.skip(str(error))
    model, tokenizer = load_float32(original), original.tokenizer()
    infos = original.tensor_infos()
    stack = find_stack(infos, 30)
    heldout = read_documents("builtin:heldout", tokenizer, limit=4)
    whole = perplexity(losses(model, heldout))
    healed = fit_linear_heal(
        model, windows("builtin:calibration", tokenizer, 16, 256, 0), (14, 25), stack
    )
    for block in (14, 25):
        find_blocks(model)[block].register_forward_hook(lambda module, args, output: args[0])
    pruned = perplexity(losses(model, heldout))
    apply_heal(model, healed, infos, stack)
    assert whole < perplexity(losses(model, heldout)) < pruned - 0.2 * (pruned - whole)
