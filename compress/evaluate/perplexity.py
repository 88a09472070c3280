"""Perplexity of a causal language model over fixed windows of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from compress.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

_SLICE = 128  # positions whose float32 log-likelihoods exist at a time


def perplexity(model: Any, tokens: torch.Tensor, progress: Progress = SILENT) -> float:
    """``exp`` of the mean negative log-likelihood of each token given those before it.

    ``tokens``: int64 [n, length]; every window is scored on its own, its first token not at all.
    The model is run one window at a time; log-likelihoods are taken in float32 for a few positions
    at a time and summed in float64. Raises `ValueError` for tokens of another shape.
    """
    import torch
    from torch.nn.functional import cross_entropy

    if tokens.ndim != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise ValueError(f"expected tokens [n >= 1, length >= 2], got {list(tokens.shape)}")
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode(), progress.step("perplexity", tokens.numel(), "tokens") as step:
        for window in tokens.to(device):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            for part, targets in zip(logits.split(_SLICE), window[1:].split(_SLICE), strict=True):
                losses = cross_entropy(part.float(), targets, reduction="none")
                total += losses.double().sum().item()
            step.advance(len(window))
    return math.exp(total / (tokens.numel() - len(tokens)))
