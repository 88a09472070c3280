"""How a model's perplexity changes when quantized weights take the place of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.quant.activations import quantized_inputs
from compress.quant.moments import linear_modules
from compress.quant.qtensor import side_by_side
from compress.signals import check_tokens

if TYPE_CHECKING:
    import torch

_SLICE = 128  # positions whose float32 log-likelihoods exist at a time


class QuantizedPerplexity:
    """Perplexities on ``tokens``, int64 [sequences, length], whose first ones are not predicted.

    ``model``: in eval mode; the weights ``names`` of its linear layers have the values that
    ``read`` gives, maybe in a wider dtype. Each sequence runs by itself, on one thread, so on a CPU
    the result depends on no number of threads; in memory are the logits of as many as there are.

    Raises `BadInput` for a name that no linear layer has, and as `check_tokens`.
    """

    def __init__(
        self,
        model: Any,
        read: Callable[[str], torch.Tensor],
        names: Collection[str],
        tokens: torch.Tensor,
        progress: Progress = SILENT,
    ) -> None:
        check_tokens(model.config, tokens)
        self._model, self._read, self._layers = model, read, linear_modules(model, names)
        self._tokens, self._progress = tokens, progress
        self._own: float | None = None  # the mean loss of the model as it is
        self._changed: set[str] = set()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Afterwards the weights are again what is read, whatever happened."""
        import torch

        try:
            yield
        finally:
            with torch.no_grad():
                for name in sorted(self._changed):
                    self._layers[name].weight.copy_(self._read(name))
            self._changed.clear()

    def ratio(
        self, dense: Callable[[str], torch.Tensor], activations: int | None, label: str
    ) -> float:
        """The perplexity with the weights ``dense(name)`` as a multiple of the model's own.

        ``activations``: bits of the inputs of their layers, by token, None for floats. The weights
        stay until the end of `restored`. A NaN counts as infinity. Raises `BadInput` where the
        model itself computes NaN or infinity.
        """
        import torch

        if self._own is None:
            self._own = self._loss("perplexity of the model")
            if not math.isfinite(self._own):
                raise BadInput("the model's logits are not finite", got="NaN or infinity")
        for name, layer in self._layers.items():
            self._changed.add(name)
            with torch.no_grad():
                layer.weight.copy_(dense(name))
        rounded = (
            nullcontext()
            if activations is None
            else quantized_inputs(self._model, self._layers, activations)
        )
        with rounded:
            added = self._loss(label) - self._own
        return math.exp(added) if added < 700 else math.inf

    def _loss(self, label: str) -> float:
        """The mean negative log-likelihood of a token, in nats."""
        import torch

        device = next(self._model.parameters()).device
        at_once = torch.get_num_threads() if device.type == "cpu" else 1
        count, length = self._tokens.shape
        sums: list[float] = []
        with self._progress.step(label, self._tokens.numel(), "tokens") as step:
            for rows in self._tokens.to(device).split(at_once):
                sums += side_by_side(self._sum, list(rows))
                step.advance(rows.numel())
        return math.fsum(sums) / (count * (length - 1))

    def _sum(self, row: torch.Tensor) -> float:
        """Of one sequence [length]; its logits do not outlive the call."""
        import torch
        from torch.nn.functional import cross_entropy

        with torch.inference_mode():
            logits = self._model(input_ids=row[None], use_cache=False).logits[0, :-1]
            parts = zip(logits.split(_SLICE), row[1:].split(_SLICE), strict=True)
            return sum(
                cross_entropy(part.float(), targets, reduction="none").double().sum().item()
                for part, targets in parts
            )
