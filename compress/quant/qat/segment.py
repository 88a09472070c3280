"""Some consecutive blocks of a transformers model, run by themselves. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from compress.signals import block_input, block_output, find_blocks, run_base


class Segment:
    """Within `mounted`, `run` computes what blocks make of a state; the others pass theirs on."""

    def __init__(self, model: Any) -> None:
        self._model, self._blocks = model, find_blocks(model)
        self._active = range(0)
        self._state: torch.Tensor | None = None
        self._left: torch.Tensor | None = None
        self._beside: tuple[None, ...] | None = None  # what blocks return beside the state

    def __len__(self) -> int:
        return len(self._blocks)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        own = [vars(block).get("forward") for block in self._blocks]  # as accelerate sets it
        try:
            for index, block in enumerate(self._blocks):
                block.forward = partial(self._forward, index, block.forward)
            yield
        finally:
            for block, forward in zip(self._blocks, own, strict=True):
                vars(block).pop("forward", None)
                if forward is not None:
                    block.forward = forward

    def run(self, rows: torch.Tensor, state: torch.Tensor | None, active: range) -> torch.Tensor:
        """The state [batch, length, d] after the ``active`` blocks, for tokens [batch, length].

        ``state`` enters the first of them; None: the embeddings, where that is the model's first.
        The first run is to begin with block 0.
        """
        self._active, self._state = active, state
        run_base(self._model, rows)
        assert self._left is not None
        left, self._state, self._left = self._left, None, None
        return left

    def _forward(self, index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        state = block_input(args, kwargs)
        if index not in self._active:
            return state if self._beside is None else (state, *self._beside)
        if index == self._active.start and self._state is not None:
            state = self._state.clone()  # a block may add to its input in place
            args, kwargs = _with_state(state, args, kwargs)
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            self._beside = (None,) * (len(output) - 1)
        if index == self._active[-1]:
            self._left = block_output(output)
        return output


def _with_state(
    state: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
