"""How far a candidate's next-token distributions and hidden states are from its reference's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.evaluate.bootstrap import Interval, bootstrap_interval
from compress.evaluate.distributions import MEASURES, compare_logits
from compress.evaluate.documents import Documents, check_fits
from compress.evaluate.likelihood import not_finite, perplexity_ratio
from compress.progress import SILENT, Progress
from compress.signals import matrix_entropy, nuclear_norm

if TYPE_CHECKING:
    import numpy as np
    import torch

    Reader = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

TOP_K = 20
_SIGNALS = (matrix_entropy, nuclear_norm)
_STATES = ("matrix_entropy_reference", "matrix_entropy", "nuclear_norm_reference", "nuclear_norm")


@dataclass(frozen=True)
class Divergence:
    """Two models on the same documents.

    ``sums``: by name float64 [documents], what `metrics` is made of: the counts ``windows`` and
    ``tokens`` (the predicted ones), the `MEASURES` summed over a document's tokens, and what
    describes hidden states summed over its windows.
    """

    documents: int
    tokens: int
    sums: dict[str, np.ndarray]

    def metrics(self, confidence: float = 0.95, seed: int = 0) -> dict[str, Interval]:
        """By name the metric with its bootstrap interval over documents.

        Of all tokens: ``perplexity_reference``, ``perplexity`` and ``perplexity_ratio``; in nats a
        token ``kl``, ``kl_top_k`` and ``jsd``, which is at most ``ln 2``; as shares of the tokens
        ``top1_agreement`` and ``flip_rate`` (arXiv 2407.09141); see `compare_logits`. Of the last
        hidden states: ``matrix_entropy`` and ``nuclear_norm``, each also as ``…_reference``, means
        over documents of the mean over windows; they compare only with each other.
        """
        import numpy as np

        def interval(statistic: Callable[..., Any], *names: str) -> Interval:
            columns = [self.sums[name] for name in names]
            return bootstrap_interval(statistic, columns, confidence=confidence, seed=seed)

        def share(part: np.ndarray, whole: np.ndarray, axis: int) -> Any:
            return part.sum(axis) / whole.sum(axis)

        def perplexity(nll: np.ndarray, tokens: np.ndarray, axis: int) -> Any:
            return np.exp(share(nll, tokens, axis))

        def mean(part: np.ndarray, windows: np.ndarray, axis: int) -> Any:
            return (part / windows).mean(axis)

        reference, candidate = (
            np.stack([self.sums[name], self.sums["tokens"]], axis=1)
            for name in ("nll_reference", "nll")
        )
        return {
            "perplexity_reference": interval(perplexity, "nll_reference", "tokens"),
            "perplexity": interval(perplexity, "nll", "tokens"),
            "perplexity_ratio": perplexity_ratio(
                reference, candidate, confidence=confidence, seed=seed
            ),
            **{name: interval(share, name, "tokens") for name in MEASURES[2:]},
            **{name: interval(mean, name, "windows") for name in _STATES},
        }


def divergence(
    reference_model: Any,
    model: Any,
    documents: Documents,
    *,
    top_k: int = TOP_K,
    progress: Progress = SILENT,
) -> Divergence:
    """Read ``documents`` with both models side by side and compare what they say.

    One pass, a window at a time: only one window's logits of each model exist, and float32
    distributions of a few of its tokens. Hidden states are those that the models' heads are given,
    of all the window's tokens. Raises `BadInput` where the models' vocabularies differ in size,
    where a model has no head or cannot read the windows, and for logits that are not finite.
    """
    import numpy as np
    import torch

    _check(reference_model, model, documents, top_k)
    names = ("windows", "tokens", *MEASURES, *_STATES)
    sums = {name: np.zeros(documents.count) for name in names}
    with (
        torch.inference_mode(),
        _reader(reference_model) as read_reference,
        _reader(model) as read,
        progress.step("divergence", documents.tokens, "tokens") as step,
    ):
        for document, window in documents:
            values = _measure(read_reference, read, window, top_k, document)
            for name, value in zip(names, values, strict=True):
                sums[name][document] += value
            step.advance(len(window) - 1)
    return Divergence(documents.count, documents.tokens, sums)


def _measure(
    read_reference: Reader, read: Reader, window: torch.Tensor, top_k: int, document: int
) -> list[float]:
    """What one window adds to the sums; its logits do not outlive the call."""
    reference, reference_state = read_reference(window)
    candidate, state = read(window)
    candidate, targets = candidate.to(reference.device), window[1:].to(reference.device)
    found = compare_logits(reference, candidate, targets, top_k)
    if not math.isfinite(found["kl"]):  # as it is if any logit of either is not
        sound = bool(reference.isfinite().all())
        raise not_finite("the candidate" if sound else "the reference", document)
    states = [signal(x) for signal in _SIGNALS for x in (reference_state, state)]
    return [1, len(targets), *found.values(), *states]


def _check(reference_model: Any, model: Any, documents: Documents, top_k: int) -> None:
    if top_k < 1:
        raise BadInput("kl_top_k needs a token", got=f"top_k {top_k}", expected="1 or more")
    check_fits(reference_model, documents, "reference")
    check_fits(model, documents, "candidate")
    expected, got = (
        each.config.get_text_config(decoder=True).vocab_size for each in (reference_model, model)
    )
    if got != expected:
        raise BadInput(
            "the models' vocabularies differ in size",
            where="candidate",
            got=got,
            expected=f"{expected} as the reference's",
        )


@contextmanager
def _reader(model: Any) -> Iterator[Reader]:
    """Gives, for a window, logits [tokens - 1, vocabulary] and last hidden state [tokens, d]."""
    head = model.get_output_embeddings()
    if head is None:
        raise BadInput("a model without a language-model head", got=type(model).__name__)
    device = next(model.parameters()).device
    state: torch.Tensor

    def keep(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal state
        state = args[0][0]

    def read(window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=window[None].to(device), use_cache=False).logits
        return logits[0, :-1], state

    handle = head.register_forward_pre_hook(keep)
    try:
        yield read
    finally:
        handle.remove()
