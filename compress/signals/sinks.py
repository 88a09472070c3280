"""Attention sinks: the few tokens with massive activations that would drown every statistic."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MASSIVE = 10


def massive_tokens(x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Which tokens' norms exceed `MASSIVE` times the median of the attended ones: bool [tokens].

    ``x``: float32 [tokens, d]; ``attended``: bool [tokens], False for padding.
    """
    import torch

    norms = torch.linalg.vector_norm(x, dim=1)
    return attended & (norms > MASSIVE * norms[attended].median())


def ordinary_tokens(x: torch.Tensor, y: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The tokens to measure a block on, the same at its input and its output: bool [tokens].

    Left out are padding, the first attended token, and what is massive on either side. In
    SmolLM2-135M, block 11 takes the norm of token 0 from 136 to 20,844 while the median stays at
    137; unmasked, bucket entropy then falls by 553 nats and makes the one block that must stay look
    the best to remove. With different masks on the two sides the difference of entropies would
    measure the masks.
    """
    keep = attended & ~massive_tokens(x, attended) & ~massive_tokens(y, attended)
    keep[attended.int().argmax()] = False
    return keep


def sinks_written(x: torch.Tensor, y: torch.Tensor, attended: torch.Tensor) -> int:
    """How many tokens become massive between a block's input ``x`` and its output ``y``."""
    return int((massive_tokens(y, attended) & ~massive_tokens(x, attended)).sum())
