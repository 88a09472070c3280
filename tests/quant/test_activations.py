"""Rounding by token is that of compressed-tensors, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.quant.activations import fake_quant_tokens, quantized_inputs

TOKENS = torch.arange(40).view(2, 20) * 7 % 250
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def theirs(x: torch.Tensor, bits: int) -> torch.Tensor:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = quantization.QuantizationArgs(
        num_bits=bits, strategy="token", symmetric=True, dynamic=True
    )
    return fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, torch.nn.Module()), args)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_bits_are_those_of_compressed_tensors(dtype: torch.dtype, bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32, 96) * torch.randn(4, 32, 1).mul(4).exp()
    x[0, 0] = 0.0
    x[0, 1] = -0.0
    x[0, 2, :4] = torch.tensor([-0.0, 1.0, -1.0, 0.0])
    x[1, 0] = -x[1, 0].abs()
    x[1, 1] *= 1e-8  # the scale is 0 in float16
    x[1, 2] = torch.arange(96) - 47.5  # ties
    x = x.to(dtype)
    before = x.clone()
    assert torch.equal(bits_of(fake_quant_tokens(x, bits)), bits_of(theirs(x, bits)))
    assert torch.equal(bits_of(x), bits_of(before))


def test_the_chosen_layers_get_rounded_inputs(tiny_llama: Path) -> None:
    model: Any = checkpoint.open(tiny_llama).load_model(dtype=torch.float32)
    chosen = ["model.layers.1.mlp.down_proj", "model.layers.4.self_attn.k_proj"]
    other = "model.layers.1.mlp.up_proj"
    given: dict[str, torch.Tensor] = {}
    taken: dict[str, torch.Tensor] = {}
    for name in (*chosen, other):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda module, args, name=name: given.update({name: args[0]})
        )
        layer.register_forward_hook(
            lambda module, args, output, name=name: taken.update({name: args[0]})
        )
    with torch.no_grad():
        plain = model(TOKENS)[0]
        with quantized_inputs(model, [f"{name}.weight" for name in chosen]):
            rounded = model(TOKENS)[0]
        for name, x in given.items():
            assert torch.equal(taken[name], fake_quant_tokens(x) if name in chosen else x)
        assert 0 < float((rounded - plain).norm() / plain.norm()) < 0.02
        assert torch.equal(model(TOKENS)[0], plain)


def test_what_would_not_be_rounded_by_token_is_refused(tiny_llama: Path) -> None:
    model = checkpoint.open(tiny_llama).load_model(dtype=torch.float32)
    wrong = "model.layers.0.mlp.up_prj.weight"
    with pytest.raises(BadInput, match="did you mean"), quantized_inputs(model, [wrong]):
        pass
    layer = model.model.layers[0].mlp
    with (
        quantized_inputs(model),
        pytest.raises(BadInput, match=r"layers\.0\.mlp\.gate_proj\.weight.*2 dimensions"),
    ):
        layer(torch.randn(5, 64))
    assert not any(module._forward_pre_hooks for module in model.modules())
