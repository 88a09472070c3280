"""One forward on its way through a pruned model, and what is refused of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.tokens.attention import Attended
from compress.tokens.families import Family
from compress.tokens.plan import Plan
from compress.tokens.remap import Held

if TYPE_CHECKING:
    import torch

_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
_KNOWN = {"hidden_states", "attention_mask", "position_ids", "position_embeddings"}


@dataclass(eq=False)
class Forward:
    """What the engine knows of a forward that is under way.

    ``plan``: its segments, if any; ``records``: whether hidden states are recorded, and so are to
    have full length after every layer; ``active``: whether it prunes, or goes on from a pruned
    cache. ``held_before``: what the later layers hold already, None for all; from layer K on,
    ``new``: the tokens that go on, counted in this forward; ``keys``: all that the later layers
    hold, counted in the sequence; ``whole``: the states before that layer.
    """

    plan: Plan | None
    records: bool
    active: bool = False
    length: int = 0
    past: int = 0
    mask: Any = None
    cache: Any = None
    attended: Attended | None = None
    held_before: Held | None = None
    new: Held = field(init=False)
    keys: Held = field(init=False)
    whole: torch.Tensor = field(init=False)
    _made: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def once(self, source: Any, make: Callable[[Any], Any]) -> Any:
        """What ``make`` makes of ``source``, made once: layers share masks and positions."""
        if id(source) not in self._made:
            self._made[id(source)] = source, make(source)  # with it, so that no other has its id
        return self._made[id(source)][1]


class Arguments:
    """A call's arguments by name, each where the caller put it."""

    def __init__(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._names = names
        self._args, self.kwargs = list(args), dict(kwargs)

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(self._args)

    def get(self, name: str) -> Any:
        """None where it was not given."""
        place = self._place(name)
        return self.kwargs.get(name) if place is None else self._args[place]

    def put(self, name: str, value: Any) -> None:
        place = self._place(name)
        if place is None:
            self.kwargs[name] = value
        else:
            self._args[place] = value

    @property
    def cache(self) -> Any:
        cache = self.get("past_key_values")
        return self.get("layer_past") if cache is None else cache

    def asks(self, name: str, configs: Sequence[Any]) -> bool:
        """Whether an output is asked for, by this argument or, where it says nothing, a config.

        Layers may be asked for by number, so 0 is a yes.
        """
        stated = self.get(name)
        values = [getattr(config, name, None) for config in configs] if stated is None else [stated]
        return any(value is not None and value is not False for value in values)

    def tensors(self) -> list[str]:
        """The names of all arguments that are tensors with dimensions."""
        named = {**dict(zip(self._names, self._args, strict=False)), **self.kwargs}
        return [name for name, value in named.items() if getattr(value, "ndim", 0)]

    def _place(self, name: str) -> int | None:
        if name in self._names and self._names.index(name) < len(self._args):
            return self._names.index(name)
        return None


def parameters(module: Any) -> list[str]:
    """The names of what a module's ``forward`` takes, in order."""
    return list(inspect.signature(module.forward).parameters)


def check_model(given: Arguments, configs: Sequence[Any]) -> None:
    """Raise `BadInput` for outputs that cannot be given whole, and for an unknown attention.

    ``configs``: of the model and its text stack.
    """
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if given.asks("output_attentions", configs):
        raise BadInput(
            "attention weights are not given of a pruned model: later layers have fewer of them",
            where="output_attentions",
            mend="leave it off, or switch pruning off",
        )
    implementation = configs[-1]._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise BadInput(
            "this attention is not pruned: its masks cannot be remapped",
            got=implementation,
            expected=", ".join(_IMPLEMENTATIONS),
            mend="model.set_attn_implementation('sdpa')",
        )
    if "flash" in implementation and not (
        is_flash_attn_2_available() or is_flash_attn_3_available()
    ):
        raise BadInput("flash attention is not installed", got=implementation)


def check_layers(given: Arguments, forward: Forward, family: Family) -> None:
    """Raise `BadInput` for arguments of layer 0 that would not be remapped rightly."""
    from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer

    cache = forward.cache
    if cache is not None:
        static = any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ()))
        if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache) or static:
            raise BadInput(
                "this cache cannot hold fewer tokens in later layers",
                got=type(cache).__name__,
                expected="a DynamicCache",
                mend="leave cache_implementation out",
            )
    total = forward.past + forward.length
    if family.window is not None and total > family.window:
        raise BadInput(
            "a sequence longer than its sliding window is not pruned",
            where=type(family.decoder).__name__,
            got=f"{total} tokens",
            expected=f"at most {family.window}",
        )
    strange = [name for name in given.tensors() if name not in _KNOWN]
    if strange:
        raise BadInput("a decoder layer is given more than can be remapped", got=", ".join(strange))
