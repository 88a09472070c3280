"""Matrices whose single weights a model cannot do without.

Yu et al., "The Super Weight in Large Language Models", arXiv 2411.07191, section 3.1: a super
weight sits in the down projection of an MLP, mostly of an early block, where both what goes in and
what comes out have a spike that no other block has. The largest input times that weight makes the
largest output, ``y[i] = x[j] * w[i, j]`` but for little.
"""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.signals import find_blocks, run_base

if TYPE_CHECKING:
    import torch

DOWN = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2")
_SPIKE = 10.0  # times the median over the down projections
_SHARE = 0.5  # of the largest output that the one product makes at least


def super_weights(model: Any, tokens: torch.Tensor) -> list[str]:
    """Names of the weights that hold a super weight, of a transformers model in eval mode.

    ``tokens``: int64 [sequences, length]; any text will do, a sequence is enough. To be kept at
    fine steps: `quantize_ecsq` with ``c = 0``, or 8 bits by row. Only linear layers are looked at.
    Raises `BadInput` for a model without a down projection that is known.
    """
    import torch

    inside = {module for block in find_blocks(model) for module in block.modules()}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in DOWN
        if module in inside
    }
    if not layers:
        raise BadInput(
            "no down projection that is known",
            where=type(model).__name__,
            expected=f"linear layers named one of {', '.join(DOWN)}",
        )
    inputs = dict.fromkeys(layers, 0.0)
    outputs = dict.fromkeys(layers, 0.0)
    shares = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            x, y = args[0].flatten(0, -2), output.flatten(0, -2)
            if not x.numel():  # an expert that no token went to
                return
            inputs[name] = max(inputs[name], float(x.abs().max()))
            largest = float(y.abs().max())
            if largest > outputs[name]:
                outputs[name] = largest
                token, row = divmod(int(y.abs().argmax()), y.shape[1])
                product = x[token].double() * module.weight[row].double()
                shares[name] = float(product.abs().max()) / largest

        return hook

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in layers.items():
            hooks.callback(module.register_forward_hook(watch(name)).remove)
        device = next(model.parameters()).device
        for sequence in tokens:
            run_base(model, sequence[None].to(device))
    return [
        f"{name}.weight"
        for name in layers
        if inputs[name] > _SPIKE * median(inputs.values())
        and outputs[name] > _SPIKE * median(outputs.values())
        and shares[name] > _SHARE
    ]
