"""How likely a causal language model finds documents, and the ratio of two models' perplexities."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.evaluate.bootstrap import Interval, bootstrap_interval
from compress.evaluate.documents import Documents, check_fits
from compress.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np
    import torch

_SLICE = 128  # positions whose float32 log-likelihoods exist at a time


def losses(
    model: Any, documents: Documents, progress: Progress = SILENT, whose: str = "the model"
) -> np.ndarray:
    """The negative log-likelihood of each document in nats, and its number of predicted tokens.

    float64 [documents, 2]. Each window is read by itself and its first token is not predicted. Log-
    likelihoods are taken in float32, a few positions at a time, and summed in float64. Raises
    `BadInput` for windows that the model cannot read and for logits that are not finite.
    """
    import numpy as np
    import torch

    check_fits(model, documents)
    sums = np.zeros((documents.count, 2))
    with (
        torch.inference_mode(),
        progress.step(f"perplexity of {whose}", documents.tokens, "tokens") as step,
    ):
        for document, window in documents:
            nll = _window_nll(model, window)
            if not math.isfinite(nll):
                raise not_finite(whose, document)
            sums[document] += nll, len(window) - 1
            step.advance(len(window) - 1)
    return sums


def perplexity(scored: np.ndarray) -> float:
    """The perplexity of a result of `losses`: ``exp`` of the mean loss a token of all documents."""
    import numpy as np

    nll, tokens = scored.sum(axis=0)
    return float(np.exp(nll / tokens))


def perplexity_ratio(
    reference: np.ndarray, candidate: np.ndarray, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The candidate's perplexity as a multiple of the reference's, from two results of `losses`.

    ``exp`` of the mean loss a token that was added; documents are resampled in pairs
    (`bootstrap_interval`). Raises `BadInput` where the two are not of the same documents.
    """
    import numpy as np

    if reference.shape != candidate.shape or (reference[:, 1] != candidate[:, 1]).any():
        raise BadInput("the losses are not of the same documents")
    return bootstrap_interval(
        lambda added, tokens, axis: np.exp(added.sum(axis) / tokens.sum(axis)),
        [candidate[:, 0] - reference[:, 0], reference[:, 1]],
        confidence=confidence,
        seed=seed,
    )


def _window_nll(model: Any, window: torch.Tensor) -> float:
    """Summed over the window's tokens but the first; its logits do not outlive the call."""
    from torch.nn.functional import cross_entropy

    window = window.to(next(model.parameters()).device)
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    parts = zip(logits.split(_SLICE), window[1:].split(_SLICE), strict=True)
    return sum(
        cross_entropy(part.float(), targets, reduction="none").double().sum().item()
        for part, targets in parts
    )


def not_finite(whose: str, document: int) -> BadInput:
    """The error for logits that are NaN or infinite."""
    return BadInput(
        f"NaN logits: {whose} gives NaN or infinity",
        where=f"document {document}",
        mend="is the model broken, or is its dtype too narrow? try float32",
    )
