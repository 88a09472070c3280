"""Windows of blocks that learn to give what the float model gives, quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import BadInput, Corrupt
from compress.progress import Silent
from compress.quant.qat import QatSettings, TokenBits, Trained, train_blockwise
from compress.quant.qat.activations import fake_quant_tokens
from compress.quant.qat.distill_losses import hidden_error
from compress.quant.qtensor import QTensor, Scheme
from compress.quant.rtn import quantize_rtn
from compress.signals import run_base

W3 = Scheme(3, None, True)
WINDOWS = [range(1), range(1, 2)]
QUICK = QatSettings(steps=4, batch=2, learning_rate=1e-3, attention=0, entropy=0)
ALL = replace(QUICK, attention=1.0, entropy=0.1, rate=0.01, anneal=0.5)


@contextmanager
def loaded(model: Any, weights: Mapping[str, QTensor], bits: int | None) -> Iterator[None]:
    """The model with stored weights, and activations cut before each of them."""
    own = {name: model.get_parameter(name).data for name in weights}
    hooks = []
    for name, quantized in weights.items():
        model.get_parameter(name).data = quantized.dense(torch.float32)
        if bits is not None:
            layer = model.get_submodule(name.removesuffix(".weight"))
            cut = lambda module, args: (fake_quant_tokens(args[0], bits),)  # noqa: E731
            hooks.append(layer.register_forward_pre_hook(cut))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, value in own.items():
            model.get_parameter(name).data = value


def last_states(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What the last block gives, before the norm."""
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for row in tokens:
            run_base(model, row[None])
    hook.remove()
    return torch.cat(seen)


def same(one: Trained, other: Trained) -> bool:
    return (
        one.history == other.history
        and one.oscillation == other.oscillation
        and one.rates == other.rates
        and one.errors == other.errors
        and list(one.weights) == list(other.weights)
        and all(
            value.codes.equal(other.weights[name].codes)
            and value.scale.equal(other.weights[name].scale)
            for name, value in one.weights.items()
        )
    )


class Interrupted(Silent):
    """Progress that ends a run after some steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def advance(self, amount: int) -> None:
        self._left -= amount
        if self._left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("scale", ["lsq", "statsq"])
def test_training_betters_what_leaves_the_model(
    scale: Any, make_model: Any, make_tokens: Any, projections: Any
) -> None:
    model, tokens = make_model(), make_tokens()
    targets = projections(model, W3)
    settings = replace(ALL, steps=12, learning_rate=5e-3, scale=scale, rate=0, anneal=0)
    untrained = train_blockwise(
        model,
        tokens,
        targets,
        replace(settings, steps=1, learning_rate=1e-12, step_rate=0),
        WINDOWS,
    )
    trained = train_blockwise(model, tokens, targets, settings, WINDOWS)
    assert len(trained.history) == 24
    assert trained.errors[-1] < 0.9 * untrained.errors[-1]
    assert trained.weights.keys() == targets.keys() == trained.rates.keys()
    assert any(trained.oscillation.values())


@pytest.mark.parametrize("activations", [None, 8])
def test_what_was_trained_is_what_the_stored_weights_compute(
    activations: int | None, make_model: Any, make_tokens: Any, projections: Any
) -> None:
    """Gate G2, from outside: the error that training reports is that of the stored weights."""
    model, tokens = make_model(), make_tokens()
    targets = projections(model, Scheme(4, 16, True))
    result = train_blockwise(model, tokens, targets, QUICK, WINDOWS, activations=activations)
    whole = last_states(model, tokens)
    with loaded(model, result.weights, activations):
        stored = last_states(model, tokens)
    errors = [hidden_error(a[None], b[None]) for a, b in zip(stored, whole, strict=True)]
    assert result.errors[-1] == sum(float(error) for error in errors) / len(tokens)


def test_the_rate_is_a_knob(make_model: Any, make_tokens: Any, projections: Any) -> None:
    model, tokens = make_model(), make_tokens()
    targets = projections(model, Scheme(4, None, True))
    found = [
        train_blockwise(
            model, tokens, targets, replace(QUICK, steps=8, step_rate=0.05, rate=rate), WINDOWS
        )
        for rate in (0.0, 0.5)
    ]
    bits = [sum(rate.codes for rate in result.rates.values()) for result in found]
    assert bits[1] < 0.95 * bits[0]
    assert found[1].errors[-1] > found[0].errors[-1]


def test_the_model_is_left_as_it_was(make_model: Any, make_tokens: Any, projections: Any) -> None:
    model, tokens = make_model(), make_tokens()
    model.model.norm.weight.requires_grad_(False)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    before = model.config._attn_implementation
    targets = projections(model, W3)
    train_blockwise(model, tokens, targets, ALL, WINDOWS, activations=8)
    with pytest.raises(KeyboardInterrupt):
        train_blockwise(model, tokens, targets, ALL, WINDOWS, progress=Interrupted(2))
    assert all(value.equal(values[name]) for name, value in model.state_dict().items())
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == ["model.norm.weight"]
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(value.grad is None for value in model.parameters())
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("steps", [2, 5])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    steps: int, make_model: Any, make_tokens: Any, projections: Any, tmp_path: Path
) -> None:
    model, tokens = make_model(), make_tokens()

    def run(**more: Any) -> Trained:
        return train_blockwise(
            model, tokens, projections(model, W3), ALL, WINDOWS, activations=8, **more
        )

    expected = run()
    journal = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        run(journal=journal, progress=Interrupted(steps))
    kept = len(list(journal.glob("*"))) if journal.exists() else 0
    assert kept == (1 if steps == 5 else 0)
    assert same(run(journal=journal), expected)
    assert same(run(journal=journal), expected)  # all of it is kept


def test_a_journal_of_another_training_or_damaged(
    make_model: Any, make_tokens: Any, projections: Any, tmp_path: Path
) -> None:
    model, tokens = make_model(), make_tokens()
    targets = projections(model, W3)
    train_blockwise(model, tokens, targets, QUICK, WINDOWS, journal=tmp_path, subject="a")
    for settings, text, subject in (
        (replace(QUICK, seed=1), tokens, "a"),
        (QUICK, tokens.flip(0), "a"),
        (QUICK, tokens, "b"),
    ):
        with pytest.raises(BadInput, match="window-000.*the journal is that of another training"):
            train_blockwise(
                model, text, targets, settings, WINDOWS, journal=tmp_path, subject=subject
            )
    path = tmp_path / "window-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match="not the whole journal of a training"):
        train_blockwise(model, tokens, targets, QUICK, WINDOWS, journal=tmp_path, subject="a")


def test_blocks_outside_of_windows_stay_floats(
    make_model: Any, make_tokens: Any, projections: Any
) -> None:
    """Whether no window has them, or one without targets: nothing is lost before block 1."""
    model, tokens = make_model(), make_tokens()
    targets = projections(model, W3, 1)
    result = train_blockwise(model, tokens, targets, QUICK, [range(1, 2)])
    assert all("layers.1." in name for name in result.weights)
    other = train_blockwise(model, tokens, targets, QUICK, WINDOWS)
    assert other.errors == (0.0, *result.errors)
    assert other.history == result.history
    both = train_blockwise(model, tokens, projections(model, W3), QUICK, WINDOWS)
    assert both.errors[1] > 1.5 * result.errors[0]


def test_steps_can_start_from_quantized_weights(
    make_model: Any, make_tokens: Any, projections: Any
) -> None:
    model, tokens = make_model(), make_tokens()
    targets = projections(model, W3)
    start = {
        name: quantize_rtn(model.get_parameter(name), W3, torch.bfloat16, name=name)
        for name in targets
    }
    settings = replace(QUICK, steps=1, learning_rate=1e-12, step_rate=0)
    result = train_blockwise(model, tokens, targets, settings, WINDOWS, start=start)
    for name, value in start.items():
        ratio = result.weights[name].scale.float() / value.scale.float()
        assert (ratio - 1).abs().max() <= 2**-7  # the logarithm may round up to the next bfloat16
    other = train_blockwise(model, tokens, targets, settings, WINDOWS)
    assert any(not other.weights[n].scale.equal(result.weights[n].scale) for n in targets)


def test_keys_values_and_narrow_tokens_are_simulated(
    make_model: Any, make_tokens: Any, projections: Any
) -> None:
    model, tokens = make_model(), make_tokens()
    targets = projections(model, Scheme(8, None, True))

    def error(**options: Any) -> float:
        settings = replace(QUICK, steps=1, learning_rate=1e-12, step_rate=0, **options)
        return train_blockwise(model, tokens, targets, settings, WINDOWS, activations=8).errors[-1]

    plain = error(entropy=1e-9)  # in eager attention, as all below
    assert error(kv_bits=3) > 2 * plain
    narrow = error(token_bits=TokenBits(low=3))
    assert narrow > 2 * plain
    assert error(token_bits=TokenBits(low=3, threshold=0)) == plain
    assert error(token_bits=TokenBits(low=3, threshold=2)) > narrow


REFUSALS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (
        lambda a: {"windows": [range(1, 2), range(1)]},
        "windows are not in order, got range(0, 1)",
    ),
    (lambda a: {"windows": [range(3)]}, "windows are not in order"),
    (lambda a: {"windows": [range(0)]}, "windows are not in order"),
    (lambda a: {"windows": [range(0, 2, 2)]}, "windows are not in order"),
    (lambda a: {"windows": [range(1)]}, "a weight to train is in none of the windows"),
    (lambda a: {"targets": {"model.layers.0.nothing.weight": W3}}, "the model has no such weight"),
    (
        lambda a: {"targets": {"model.layers.0.input_layernorm.weight": W3}},
        "model.layers.0.input_layernorm.weight: not the weight of a linear layer",
    ),
    (
        lambda a: {"targets": dict.fromkeys(a["targets"], Scheme(4, None, False))},
        "only symmetric codes can be trained",
    ),
    (lambda a: {"activations": 16}, "activations.bits: no such width, got 16, expected 2 to 8"),
    (
        lambda a: {"settings": replace(QUICK, token_bits=TokenBits())},
        "qat.token_bits: narrow tokens need quantized activations; set activations.bits",
    ),
    (
        lambda a: {"settings": replace(QUICK, rate=3e38)},
        "the loss is not finite",
    ),
    (
        lambda a: {"settings": replace(QUICK, step_rate=1e30)},
        "_proj.weight: its step is beyond torch.bfloat16; lower qat.step_rate",
    ),
    (lambda a: {"model": a["model"].bfloat16()}, "only float32 can be trained, got torch.bfloat16"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[m[:40] for _, m in REFUSALS])
def test_what_cannot_be_trained_is_one_line(
    change: Any, message: str, make_model: Any, make_tokens: Any, projections: Any
) -> None:
    model = make_model()
    arguments = {
        "model": model,
        "tokens": make_tokens(),
        "targets": projections(model, W3),
        "settings": QUICK,
        "windows": WINDOWS,
    }
    with pytest.raises(BadInput) as caught:
        train_blockwise(**arguments | change(arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
