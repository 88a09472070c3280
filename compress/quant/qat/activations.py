"""Activations in integers of few bits, one scale a token, taken as it comes.

``scale = max|x| / (2^bits - 1) * 2`` and codes of -2^(bits-1) to 2^(bits-1)-1, bit for bit as
compressed-tensors 0.20 has symmetric, dynamic quantization by token. At most half a step is cut
off, so gradients pass everywhere (straight-through). Imports torch.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.quant.activations import fake_quant_tokens as rounded_tokens


def fake_quant_tokens(x: torch.Tensor, bits: int) -> torch.Tensor:
    """``x`` [.., d], each of its vectors as the integers of ``bits`` bits that will be computed."""
    quantized: torch.Tensor = _Straight.apply(x, bits)
    return quantized


def fake_quant_mixed(x: torch.Tensor, high: torch.Tensor, bits: int, low: int) -> torch.Tensor:
    """With ``bits`` where ``high``, bool [..], and ``low`` bits for all other vectors."""
    return torch.where(high[..., None], fake_quant_tokens(x, bits), fake_quant_tokens(x, low))


def fake_quant_kv(
    keys: torch.Tensor, values: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys after rotation, and values, [batch, heads, tokens, d]: a scale a token and head."""
    return fake_quant_tokens(keys, bits), fake_quant_tokens(values, bits)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        return rounded_tokens(x, bits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None
