"""How much a model's predictions suffer from errors in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.quant import linear_names, measure_fisher, quantize_ecsq, row_steps

TOKENS = torch.randint(0, 320, (3, 64), generator=torch.Generator().manual_seed(1))


def load(directory: Path) -> tuple[Any, list[str]]:
    opened = checkpoint.open(directory)
    return opened.load_model(dtype=torch.float32).eval(), linear_names(opened).weights


def test_it_is_the_mean_square_of_each_tokens_gradient(tiny_llama: Path) -> None:
    """Of the last block's MLP, whose output at a token concerns that token's prediction only."""
    model, names = load(tiny_llama)
    name = "model.layers.5.mlp.down_proj.weight"
    found = measure_fisher(model, TOKENS, names, seed=7)
    weight = model.get_parameter(name)
    generator = torch.Generator().manual_seed(7)
    squares = torch.zeros_like(weight)
    for row in TOKENS:
        logits = model(input_ids=row[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        losses = torch.nn.functional.cross_entropy(logits, drawn, reduction="none")
        for loss in losses:
            squares += torch.autograd.grad(loss, weight, retain_graph=True)[0].square()
    expected = squares.mean(1) / TOKENS.numel()
    assert found[name].shape == (64,)
    assert torch.allclose(found[name].float(), expected, rtol=1e-3)


def test_it_foretells_the_divergence(tiny_llama: Path) -> None:
    """Half of F dw^2 over all weights is the KL that noise of that size costs.

    So where no other token's states depend on a weight: there are no terms between tokens.
    """
    model, names = load(tiny_llama)
    found = measure_fisher(model, TOKENS.repeat(4, 1), names)
    for name in ("model.layers.5.mlp.down_proj.weight", "lm_head.weight"):
        weight = model.get_parameter(name)
        whole = weight.detach().clone()
        with torch.no_grad():
            log_p = model(TOKENS).logits.double().log_softmax(-1)
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 3e-3
            weight += noise
            log_q = model(TOKENS).logits.double().log_softmax(-1)
            weight.copy_(whole)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        foretold = float(found[name].mean()) * float(noise.square().sum()) / 2
        assert foretold == pytest.approx(kl, rel=0.2)


def test_the_model_is_left_as_it_was(tiny_llama: Path) -> None:
    model, names = load(tiny_llama)
    frozen = model.get_parameter(names[0]).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, other = (measure_fisher(model, TOKENS, names[:2], seed=3) for _ in range(2))
    assert list(one) == names[:2]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not frozen.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if n != names[0])
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(BadInput, match="is not the weight of a linear layer"):
        measure_fisher(model, TOKENS, ["model.norm.weight"])


def test_a_model_without_a_head(tiny_llama: Path) -> None:
    model, names = load(tiny_llama)
    with pytest.raises(BadInput, match="predicts no tokens"):
        measure_fisher(model.model, TOKENS, [name.removeprefix("model.") for name in names[:1]])


def test_rows_that_matter_get_finer_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 64, generator=generator)
    fisher = torch.ones(8, dtype=torch.float64)
    fisher[3] = 16.0
    w[5] = 0
    steps = row_steps(w, fisher)
    others = [0, 1, 2, 4, 6, 7]
    assert steps[5] == 1
    assert float(steps[3] / steps[others].mean()) == pytest.approx(0.5, rel=0.1)  # 16 ** -0.25
    alive = [*others, 3]
    assert abs(float(steps[alive].log().mean())) < 1e-9
    plain = quantize_ecsq(w, 0.5, torch.float32)
    scaled = quantize_ecsq(w, 0.5, torch.float32, rows=steps)
    ratio = (scaled.scale / plain.scale)[alive, 0].double()
    assert torch.allclose(ratio, steps[alive], rtol=1e-5)


def test_rows_without_any_gradient() -> None:
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(row_steps(w, torch.zeros(4, dtype=torch.float64)), torch.ones(4).double())
