"""Inputs of linear layers in 8 bits, one scale a token, taken as it comes.

Bit for bit what compressed-tensors 0.20 computes for symmetric, dynamic quantization by token, on
inputs [batch, tokens, features].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.quant.moments import linear_modules

if TYPE_CHECKING:
    import torch

BITS = 8


def fake_quant_tokens(x: torch.Tensor, bits: int = BITS) -> torch.Tensor:
    """``x`` [.., features] rounded to ``bits`` bits, each vector in steps of its own.

    ``scale = max|x| / (2^bits - 1) * 2``, codes from -2^(bits-1) to 2^(bits-1)-1, all in the dtype
    of ``x``; where the scale comes to 0 it is the dtype's epsilon. Gradients do not pass.
    """
    import torch

    half = 1 << bits - 1
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True) / (half - 0.5)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        codes = (x / scale).add_(0.0)  # the zero point: of -0 it makes 0
        return codes.clamp_(-half, half - 1).round_().mul_(scale)


@contextmanager
def quantized_inputs(
    model: Any, layers: Collection[str] | None = None, bits: int = BITS
) -> Iterator[None]:
    """While it lasts, linear layers of ``model`` compute with their inputs rounded by token.

    ``layers``: names of weights, None for all `torch.nn.Linear`. Raises `BadInput` for a name that
    none has and, as the model runs, for an input that is not [batch, tokens, features], of which
    compressed-tensors would not round each token by itself.
    """

    def rounding(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any) -> Any:
            if args[0].ndim != 3:
                raise BadInput(
                    "its inputs would not be rounded by token",
                    where=name,
                    got=f"{args[0].ndim} dimensions",
                    expected="sequences, tokens and features",
                    mend="leave this layer out",
                )
            return (fake_quant_tokens(args[0], bits), *args[1:])

        return hook

    with ExitStack() as hooks:
        for name, module in linear_modules(model, layers).items():
            hooks.callback(module.register_forward_pre_hook(rounding(name)).remove)
        yield
