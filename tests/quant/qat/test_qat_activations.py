from __future__ import annotations

import pytest
import torch

from compress.quant.qat.activations import fake_quant_kv, fake_quant_mixed, fake_quant_tokens


def noise(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[..., 0, :] = 0
    x[..., 1, :] *= 1e4
    return x


@pytest.mark.slow  # importing it takes seconds
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_compressed_tensors_computes(bits: int, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=bits, strategy="token", dynamic=True, symmetric=True)
    x = noise(2, 9, 16).to(dtype)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(16, 1))
    expected = fake_quantize(x, scale, zero, args)
    found = fake_quant_tokens(x, bits)
    assert found.dtype == dtype
    assert (found + 0).view(torch.uint8).equal((expected + 0).view(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
def test_each_token_has_its_own_scale_and_no_value_moves_far(bits: int) -> None:
    x = noise(2, 9, 16)
    error = (fake_quant_tokens(x, bits) - x).abs().amax(-1)
    step = x.abs().amax(-1) / ((1 << bits - 1) - 0.5)
    assert (error <= 0.5001 * step).all()
    assert error.max() > 0


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    x = noise(3, 5, 8).requires_grad_(True)
    weights = noise(3, 5, 8)
    (fake_quant_tokens(x, 4) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.equal(weights)


def test_keys_and_values_are_cut_by_token_and_head() -> None:
    keys, values = noise(2, 3, 9, 8), -noise(2, 3, 9, 8)
    cut = fake_quant_kv(keys, values, 4)
    for whole, part in zip((keys, values), cut, strict=True):
        for head in range(3):
            assert part[:, head].equal(fake_quant_tokens(whole[:, head], 4))


def test_two_widths() -> None:
    x, high = noise(2, 4, 8), torch.tensor([[True, True, False, True], [False] * 4])
    mixed = fake_quant_mixed(x, high, 8, 4)
    assert mixed[high].equal(fake_quant_tokens(x, 8)[high])
    assert mixed[~high].equal(fake_quant_tokens(x, 4)[~high])
