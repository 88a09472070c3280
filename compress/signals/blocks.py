"""Where a transformers model keeps its blocks, and running it without its head."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput

if TYPE_CHECKING:
    import torch


def find_blocks(model: Any) -> torch.nn.ModuleList:
    """The model's transformer blocks in order: its outermost `ModuleList` of `num_hidden_layers`.

    Raises `BadInput` where there is none, or more than one.
    """
    import torch

    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and not nested:
            found[name] = module
    if len(found) != 1:
        raise BadInput(
            "no single stack of transformer blocks",
            where=type(model).__name__,
            got=", ".join(found) or "none",
            expected=f"one list of num_hidden_layers ({count}) modules",
        )
    return next(iter(found.values()))


def run_base(model: Any, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
    """The last hidden state [batch, length, d] for ``tokens`` [batch, length], without any head.

    Leaving out the head saves a large matrix product and the logits' memory. No cache is built.
    """
    base = model.base_model
    options = (
        {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    )
    return base(input_ids=tokens, attention_mask=attention_mask, **options)[0]


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state [batch, length, d] among the arguments a hook sees."""
    state: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return state


def block_output(output: Any) -> torch.Tensor:
    """The hidden state in what a block returns: a tensor, or a tuple led by it."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state
