"""Whether a policy fits a model, and how many tokens it is about, before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.tokens.families import TEXT, VISUAL, visual_ids
from compress.tokens.policy import TokenPolicy

if TYPE_CHECKING:
    import torch


def check_family(config: Any, policy: TokenPolicy) -> None:
    """Raise `BadInput` where a model of this transformers config cannot be pruned so.

    `find_family` looks closer, at the model itself.
    """
    kind, where = config.model_type, "config.json"
    known = VISUAL if policy.target == "visual" else TEXT
    if kind not in known:
        other = "text" if kind in TEXT else "visual" if kind in VISUAL else None
        raise BadInput(
            f"no {policy.target} tokens are pruned in this model",
            where=where,
            got=f"model type {kind}",
            expected=", ".join(known),
            mend=f"set target to '{other}'" if other else None,
        )
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if policy.layer >= layers:
        raise BadInput(
            "there is no such layer to prune before",
            where=where,
            got=f"layer {policy.layer}",
            expected=f"1 to {layers - 1}",
        )


def count_tokens(config: Any, ids: torch.Tensor, policy: TokenPolicy) -> tuple[int, int]:
    """Of one prompt, ids int64 [1, length] without padding: how many may go, and the others."""
    import torch

    length = ids.shape[1]
    if policy.target == "text":
        free = max(0, length - policy.sinks - policy.recent)
    else:
        free = int(torch.isin(ids, torch.tensor(visual_ids(config), device=ids.device)).sum())
    return free, length - free
