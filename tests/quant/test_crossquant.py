"""Steps by token and column, and what rounding takes away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.quant.activations import fake_quant_tokens
from compress.quant.crossquant import Kernel, fake_quant_cross, kernel_fractions


def outliers(seed: int = 0) -> torch.Tensor:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 300
    return x


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 1.0])
def test_codes_are_within_range_and_errors_within_half_a_step(alpha: float) -> None:
    x = outliers()
    size = x.abs().double()
    step = size.amax(1, keepdim=True) ** alpha * size.amax(0) ** (1 - alpha) / 127
    rounded = fake_quant_cross(x, alpha=alpha).double()
    codes = rounded / step
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert float(codes.abs().max()) < 127.001
    assert bool(((rounded - x).abs() <= step * 0.5001).all())


def test_columns_of_zeros_stay() -> None:
    x = outliers()
    x[:, 5], x[7] = 0.0, 0.0
    rounded = fake_quant_cross(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert bool((rounded[:, 5] == 0).all())
    assert bool((rounded[7] == 0).all())
    assert bool(rounded.isfinite().all())


def test_alpha_is_a_share() -> None:
    with pytest.raises(BadInput, match="alpha"):
        fake_quant_cross(outliers(), alpha=1.5)


def test_kernels_are_counted_by_layer(tiny_llama: Path) -> None:
    model = checkpoint.open(tiny_llama).load_model(dtype=torch.float32)
    model.model.layers[2].input_layernorm.weight.data[3] = 300.0
    name, other = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (2, 4))
    tokens = torch.arange(120).view(2, 60) * 7 % 250
    found = kernel_fractions(model, tokens, layers=[name, other])
    assert found[name].token_share > 0.5
    assert found[name].cross_share < 0.1
    assert found[other].token_share < 0.1

    inputs: list[torch.Tensor] = []
    model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0][0])
    )
    total = Kernel(0, 0, 0)
    for sequence in tokens:
        with torch.no_grad():
            model(sequence[None])
        x = inputs[-1]
        lost = [
            int(((rounded == 0) & (x != 0)).sum())
            for rounded in (fake_quant_tokens(x), fake_quant_cross(x))
        ]
        total += Kernel(int((x != 0).sum()), *lost)
    assert total == found[name]
