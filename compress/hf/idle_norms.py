"""Which norms of a block are idle once some of its modules are taken out."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from compress.signals import block_input


class Trace:
    """Which norms of a block serve only the modules ``skipped``, seen in one pass."""

    def __init__(self, block: nn.Module, skipped: tuple[str, ...], undo: ExitStack) -> None:
        self.extra: dict[str, int] = {}
        self._skipped = skipped
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._norms = [
            name
            for name, module in block.named_children()
            if name not in skipped and any(True for _ in module.parameters())
        ]
        self._hooks = [
            module.register_forward_hook(self._record(name), with_kwargs=True)
            for name, module in block.named_children()
        ]
        for hook in self._hooks:
            undo.callback(hook.remove)

    def stop(self) -> list[str]:
        """The norms that only skipped modules read, and those that only pass on their zeros."""
        for hook in self._hooks:
            hook.remove()
        found = []
        for norm in self._norms:
            if norm not in self._outputs:
                continue
            readers = [k for k, v in self._inputs.items() if _same(v, self._outputs[norm])]
            written = [k for k, v in self._outputs.items() if _same(v, self._inputs[norm])]
            passes_zeros = set(written) & set(self._skipped) and not self._outputs[norm].any()
            if (readers and set(readers) <= set(self._skipped)) or passes_zeros:
                found.append(norm)
        return found

    def _record(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if args or "hidden_states" in kwargs:
                self._inputs[name] = block_input(args, kwargs)
                self._outputs[name] = output[0] if isinstance(output, tuple) else output
                self.extra[name] = len(output) - 1 if isinstance(output, tuple) else 0

        return hook


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
