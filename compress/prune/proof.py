"""Proof that a pruned checkpoint is the old model with those blocks left out, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint
from compress.errors import BadInput, Corrupt
from compress.prune.fitness import Removal, Unit
from compress.prune.units import without
from compress.signals import load_float32, run_base

if TYPE_CHECKING:
    import torch


def output_without(
    model: Any,
    tokens: torch.Tensor,
    removal: Removal,
    parts: Mapping[Unit, torch.nn.Module] | None = None,
) -> torch.Tensor:
    """The last hidden state [length, d] for ``tokens`` [length], nothing added by ``removal``.

    ``parts`` as in `Units`. All blocks keep their positions and the config its patterns, so this is
    what pruning must not change, whatever a model derives from a block's index.
    """
    import torch

    with without(model, removal, parts), torch.inference_mode():
        state: torch.Tensor = run_base(model, tokens[None].to(next(model.parameters()).device))
    return state[0]


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
    found = output_without(model, tokens, frozenset())
    if not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
        raise BadInput(what, where=kind, got="another output from the blocks that stay")
