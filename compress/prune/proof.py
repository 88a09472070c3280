"""Proof that a pruned checkpoint is the old model with those blocks left out, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import BadInput, Corrupt
from compress.signals import block_input, find_blocks, load_float32, run_base

if TYPE_CHECKING:
    import torch


def output_without(model: Any, tokens: torch.Tensor, removed: Collection[int]) -> torch.Tensor:
    """The last hidden state [length, d] for ``tokens`` [length], the blocks ``removed`` skipped.

    All other blocks keep their positions and the config its patterns, so this is what removal must
    not change, whatever a model derives from a block's index.
    """
    import torch

    def skip(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        state = block_input(args, kwargs)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    blocks = find_blocks(model)
    hooks = [blocks[i].register_forward_hook(skip, with_kwargs=True) for i in sorted(removed)]
    try:
        with torch.inference_mode():
            state: torch.Tensor = run_base(model, tokens[None].to(next(model.parameters()).device))
            return state[0]
    finally:
        for hook in hooks:
            hook.remove()


def check_pruned(pruned: Checkpoint, tokens: torch.Tensor, expected: torch.Tensor) -> None:
    """Load the checkpoint and compare its output for ``tokens`` with ``expected``, bit for bit.

    Raises `BadInput` where its weights do not fit or the output is another: the config then has a
    setting by position that is not known here.
    """
    import torch

    what = "blocks cannot be removed: an unknown setting depends on their positions"
    kind = pruned.config.get("model_type")
    try:
        model = load_float32(pruned)
    except Corrupt as error:
        raise BadInput(what, where=kind, got=str(error)) from error
    found = output_without(model, tokens, ())
    if not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
        raise BadInput(what, where=kind, got="another output from the blocks that stay")
