"""What a transformers model's attention computes: queries, keys and maps of every block.

Imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compress.errors import BadInput


@dataclass(frozen=True, eq=False)
class Attention:
    """Of one block: ``queries`` and ``keys`` [batch, heads, tokens, d], rotated where they are.

    ``maps`` [batch, heads, tokens, tokens], after the softmax. Keys may have fewer heads.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    maps: torch.Tensor


@contextmanager
def watching(
    model: Any,
    see: Callable[[Attention], None],
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[None]:
    """Within, each attention of ``model`` shows what it computes, in the order of the blocks.

    ``change`` turns keys and values into those that are computed with. The model then runs its
    eager attention. Raises `BadInput` for a model that does not let attention be exchanged, at once
    or when it runs.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    mine = set(model.modules())
    before = model.config._attn_implementation
    outer = ALL_ATTENTION_FUNCTIONS.get("eager")

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", outer)
        if eager is None:
            raise _closed(model)
        if module not in mine:
            return eager(module, query, key, value, *args, **kwargs)
        key, value = change(key, value)
        output, maps = eager(module, query, key, value, *args, **kwargs)
        see(Attention(query, key, maps))
        return output, maps

    if not model._can_set_attn_implementation():
        raise _closed(model)
    model.set_attn_implementation("eager")
    ALL_ATTENTION_FUNCTIONS["eager"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]
        if outer is not None:
            ALL_ATTENTION_FUNCTIONS["eager"] = outer
        model.set_attn_implementation(before)


def _closed(model: Any) -> BadInput:
    return BadInput(
        "its attention cannot be watched",
        where=type(model).__name__,
        mend="set qat.attention and qat.entropy to 0, without kv_bits and token_bits",
    )
