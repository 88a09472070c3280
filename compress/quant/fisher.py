"""How much a model's predictions suffer from errors in its weights.

A small error dw of one weight costs F dw^2 / 2 nats of KL divergence a token, F being the mean
square of the gradient of the log-likelihood of tokens drawn from the model's own distribution (the
diagonal of the Fisher information; Kunstner et al., arXiv 1905.12558, section 2, say why they must
be drawn). The gradient for a linear layer is g x^T a token, so that of a row i of weights the
squares add up to g_i^2 |x|^2. Terms between tokens are left out. Large inputs do not count where,
as at attention sinks, nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.quant.ecsq import row_extent
from compress.quant.moments import linear_modules
from compress.signals import check_tokens

if TYPE_CHECKING:
    import torch

_FLOOR = 0.01  # of a matrix's mean: rows that a short text does not ask for are not worthless


def measure_fisher(
    model: Any,
    tokens: torch.Tensor,
    layers: Collection[str],
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, torch.Tensor]:
    """By name of weight, float64 [rows]: the mean F of each row of a language model's linear
    layers.

    ``model``: in eval mode, left as it is but for its parameters' ``requires_grad``, which is off
    while it runs and given back; ``tokens``: int64 [sequences, length]; ``layers``: names of
    weights. One sequence at a time goes through the model and back, and its states are all that is
    held. A layer that did not run has zeros.

    Raises `BadInput` for a model without a head, a name that no linear layer has, tokens that the
    model cannot take, and gradients that are not finite.
    """
    import torch

    check_tokens(model.config, tokens)
    if model.get_output_embeddings() is None:
        raise BadInput("predicts no tokens to be sensitive about", where=type(model).__name__)
    modules = linear_modules(model, layers)
    device = next(model.parameters()).device
    found = {
        name: torch.zeros(len(module.weight), dtype=torch.float64, device=device)
        for name, module in modules.items()
    }
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with (
        ExitStack() as undo,
        progress.step("measuring sensitivity", tokens.numel(), "tokens") as step,
    ):
        for parameter in trained:
            undo.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        # With frozen weights a graph exists only from what asks for a gradient on: the embeddings.
        entered = lambda module, args, output: output.detach().requires_grad_(True)  # noqa: E731
        undo.callback(embeddings.register_forward_hook(entered).remove)
        for name, module in modules.items():
            undo.callback(module.register_forward_hook(_watch(found[name])).remove)
        for row in tokens:
            with torch.enable_grad():
                logits = model(input_ids=row[None].to(device), use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().cpu().softmax(-1), 1, generator=generator)
                loss = torch.nn.functional.cross_entropy(
                    logits, drawn[:, 0].to(device), reduction="sum"
                )
                loss.backward()
            step.advance(len(row))
    for name, module in modules.items():
        found[name] = (found[name] / (tokens.numel() * module.weight.shape[1])).cpu()
        if not bool(found[name].isfinite().all()):
            raise BadInput("gradients are not finite", where=name, got="NaN or infinity")
    return found


def row_steps(w: torch.Tensor, fisher: torch.Tensor, name: str = "weight") -> torch.Tensor:
    """How wide each row's steps are beside c standard deviations: float64 [rows], around 1.

    ``w`` [rows, columns]; ``fisher``: its rows' F. At high rates steps proportional to 1 / sqrt(F)
    lose least, whatever the rows' spreads are; steps that are wide beside the spread do not follow
    that law, and F is estimated from little text. So this is the root of that over the spread:
    steps half way, in logarithms, between both rules.
    """
    import torch

    spread, _ = row_extent(w, name)
    fisher = fisher + _FLOOR * fisher.mean()
    alive = (spread > 0) & (fisher > 0)
    logs = torch.where(alive, -0.5 * fisher.log() - spread.log(), 0.0)
    middle = logs[alive].mean() if bool(alive.any()) else logs.new_zeros(())
    return torch.where(alive, ((logs - middle) / 2).exp(), 1.0)


def _watch(total: torch.Tensor) -> Callable[..., None]:
    """A hook of a layer that adds the squares of its weights' gradients to ``total`` [rows]."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        squares = args[0].detach().flatten(0, -2).double().square().sum(-1, keepdim=True)

        def add(gradient: torch.Tensor) -> None:
            total.add_((gradient.flatten(0, -2).double().square() * squares).sum(0))

        if output.requires_grad:
            output.register_hook(add)

    return hook
