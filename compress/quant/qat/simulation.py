"""A model that computes with other weights and activations when told to. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from compress.errors import BadInput
from compress.quant.qat.activations import fake_quant_kv, fake_quant_mixed, fake_quant_tokens
from compress.quant.qat.attention import Attention, watching
from compress.quant.qat.settings import QatSettings
from compress.quant.qat.token_bits import important_tokens


class Simulation:
    """``model`` as it is, and in `quantized` with ``weights``: functions of none, by their name.

    ``activations``: bits of the inputs of those layers, None for floats. Attention is watched where
    the settings need it: ``seen`` has what it computed since `clear`.
    """

    def __init__(
        self,
        model: Any,
        weights: Mapping[str, Callable[[], torch.Tensor]],
        settings: QatSettings,
        activations: int | None,
    ) -> None:
        self.seen: list[Attention] = []
        self._model, self._weights = model, weights
        self._settings, self._bits = settings, activations
        self._on = False
        self._important: torch.Tensor | None = None  # by the latest map, [batch, tokens]

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Within, the model's layers are under control; it is not trained itself."""
        learned = [p for p in self._model.parameters() if p.requires_grad]
        settings = self._settings
        with ExitStack() as stack:
            stack.callback(lambda: [p.requires_grad_(True) for p in learned])
            self._model.requires_grad_(False)
            for name in self._weights:
                layer = find_linear(self._model, name)
                stack.enter_context(_replaced(layer, partial(self._linear, name, layer)))
            if settings.guided or settings.simulated:
                stack.enter_context(watching(self._model, self._see, self._change))
            yield

    @contextmanager
    def quantized(self) -> Iterator[None]:
        """Within, the model is the quantized one."""
        self._on, self._important = True, None
        try:
            yield
        finally:
            self._on = False

    def clear(self) -> tuple[Attention, ...]:
        """What attention computed since the last time, by block."""
        seen, self.seen = tuple(self.seen), []
        return seen

    def _linear(
        self, name: str, layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not self._on:
            return forward(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        return torch.nn.functional.linear(self._cut(x), self._weights[name](), layer.bias)

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        if self._bits is None:
            return x
        token_bits, important = self._settings.token_bits, self._important
        if token_bits is None or important is None:  # all are, before the first map of a window
            return fake_quant_tokens(x, self._bits)
        if x.shape[:-1] != important.shape:
            raise BadInput(
                "a layer that does not see all tokens in order cannot have two widths",
                where="qat.token_bits",
                got=list(x.shape),
                expected=f"{[*important.shape, x.shape[-1]]}",
            )
        return fake_quant_mixed(x, important, self._bits, token_bits.low)

    def _change(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._on or self._settings.kv_bits is None:
            return keys, values
        return fake_quant_kv(keys, values, self._settings.kv_bits)

    def _see(self, attention: Attention) -> None:
        if self._settings.guided:
            self.seen.append(attention)
        if self._on and self._settings.token_bits is not None:
            threshold = self._settings.token_bits.threshold
            self._important = important_tokens(attention.maps, threshold)


def find_linear(model: Any, name: str) -> torch.nn.Linear:
    """The layer of the weight ``name``. Raises `BadInput` unless it is a Linear, in float32."""
    path, _, kind = name.rpartition(".")
    layer = dict(model.named_modules()).get(path)
    if kind != "weight" or not isinstance(layer, torch.nn.Linear):
        raise BadInput("not the weight of a linear layer", where=name)
    if layer.weight.dtype != torch.float32:
        raise BadInput(
            "only float32 can be trained",
            where=name,
            got=layer.weight.dtype,
            mend="load the model in float32",
        )
    return layer


@contextmanager
def _replaced(module: Any, instead: Callable[..., Any]) -> Iterator[None]:
    """``instead`` gets the module's own forward as first argument."""
    own = vars(module).get("forward")  # as accelerate sets it
    module.forward = partial(instead, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
