"""The turn that a window of adjacent blocks gives a state: a low one means, can be removed."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.signals import block_input, find_blocks, run_base

if TYPE_CHECKING:
    import torch


def window_angular(
    model: Any, tokens: torch.Tensor, n: int, *, progress: Progress = SILENT
) -> list[float]:
    """``d(h_i, h_(i+n)) = arccos(cos(h_i, h_(i+n))) / pi`` for each first block ``i`` of ``n``.

    Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887:
    ``h_i`` is the input of block ``i`` at a sequence's last token, ``h_L`` the last block's output;
    the distances, between 0 and 1, are means over the sequences of ``tokens``, int64 [sequences,
    length]. There are ``L - n + 1``. Raises `BadInput` unless ``1 <= n <= L``, and where a state is
    not finite.
    """
    import torch

    blocks = find_blocks(model)
    if not 1 <= n <= len(blocks):
        raise BadInput("no window of so many blocks", got=n, expected=f"1 to {len(blocks)}")
    device = next(model.parameters()).device
    states: list[torch.Tensor] = [torch.empty(0)] * (len(blocks) + 1)

    def enter(index: int, module: Any, args: Any, kwargs: Any) -> None:
        states[index] = block_input(args, kwargs)[0, -1].double()

    def leave(module: Any, args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        states[-1] = state[0, -1].double()

    hooks = [
        block.register_forward_pre_hook(partial(enter, index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    hooks.append(blocks[-1].register_forward_hook(leave))
    distances = []
    try:
        with (
            torch.inference_mode(),
            progress.step("measuring windows", tokens.numel(), "tokens") as step,
        ):
            for row in tokens:
                run_base(model, row[None].to(device))
                path = torch.stack(states)
                cosines = torch.cosine_similarity(path[:-n], path[n:], dim=1)
                distances.append(cosines.clamp(-1, 1).arccos() / math.pi)
                step.advance(len(row))
    finally:
        for hook in hooks:
            hook.remove()
    means = torch.stack(distances).mean(0)
    if not means.isfinite().all():
        raise BadInput("activations are not finite", got="NaN or infinity")
    return [float(mean) for mean in means]
