"""The hooks that cut the layers of a cache after a prompt and show later tokens what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.tokens.attention import count_heads, projections
from compress.tokens.cache_policy import CachePolicy
from compress.tokens.cache_prompt import CacheReport, Prompt, compress_layer, make_prompt
from compress.tokens.cache_scores import Observed
from compress.tokens.families import Family
from compress.tokens.forward import Arguments, parameters

if TYPE_CHECKING:
    import torch

_MARK = "_entropress_cache"
_IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(eq=False)
class _Forward:
    """A forward under way: its prompt, if any, and of that the layer under way and those behind."""

    prompt: Prompt | None = None
    observed: Observed | None = None
    sizes: list[tuple[int, int, int]] = field(default_factory=list)


def cache_engine_of(decoder: Any) -> CacheEngine | None:
    """The engine whose hooks a text stack carries, if any."""
    return getattr(decoder, _MARK, None)


class CacheEngine:
    """The hooks of one model, from `attach` until `remove`.

    ``report``: of the last prompt that was compressed.
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        attentions: Mapping[int, Any],
        policy: CachePolicy,
    ) -> None:
        self.policy = policy
        self.report: CacheReport | None = None
        self.heads, self.key_heads = count_heads(next(iter(attentions.values())), family.config)
        self._model, self._family, self._attentions = model, family, dict(attentions)
        self._forwards: dict[int, _Forward] = {}  # by thread: a model may run in several
        self._names = {number: parameters(family.layers[number]) for number in attentions}
        self._inputs = parameters(family.root)
        self._handles: list[Any] = []

    def attach(self) -> None:
        root, add = self._family.root, self._handles.append
        setattr(self._family.decoder, _MARK, self)
        add(root.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(root.register_forward_hook(self._end, always_call=True))
        for order, (number, attention) in enumerate(self._attentions.items()):
            layer = self._family.layers[number]
            enter, leave = partial(self._enter, number), partial(self._leave, order, number)
            add(layer.register_forward_pre_hook(enter, with_kwargs=True))
            add(layer.register_forward_hook(leave, with_kwargs=True))
            for name, module in projections(attention).items():
                if name != "k_proj":  # keys are read from the cache
                    add(module.register_forward_hook(partial(self._catch, name)))
        if hasattr(self._model, "_get_candidate_generator"):
            self._model._get_candidate_generator = _refuse_assistance

    def remove(self) -> None:
        """Take all hooks out; the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forwards.clear()
        vars(self._family.decoder).pop(_MARK, None)
        vars(self._model).pop("_get_candidate_generator", None)

    @property
    def _forward(self) -> _Forward | None:
        """This thread's; None outside of the model, as where gradients are checkpointed."""
        return self._forwards.get(get_ident())

    def _begin(self, module: Any, args: Any, kwargs: Any) -> None:
        """Before the model: which rows give a prompt, and how much of it is to stay."""
        import torch

        given = Arguments(self._inputs, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        configs = module.config, self._family.config
        forward = self._forwards[get_ident()] = _Forward()
        cache, mask = given.cache, given.get("attention_mask")
        cached = cache is not None or given.asks("use_cache", configs)
        if tokens is None or tokens.shape[1] == 1 or not cached or self.policy.budget == 1:
            return
        _check(cache, mask, configs[-1]._attn_implementation)
        rows, length = tokens.shape[:2]
        if mask is None:
            mask = torch.ones(rows, length + (0 if cache is None else cache.get_seq_length()))
        layers = len(self._attentions)
        forward.prompt = make_prompt(mask.bool().cpu(), length, layers, self.policy)

    def _end(self, module: Any, args: Any, output: Any) -> None:
        forward = self._forwards.pop(get_ident(), None)
        if forward is not None and forward.prompt is not None and forward.sizes:
            self.report = CacheReport(forward.prompt.totals, *zip(*forward.sizes, strict=True))

    def _enter(self, number: int, module: Any, args: Any, kwargs: Any) -> Any:
        """Before a layer: its mask, for the tokens that its part of the cache holds."""
        forward, given = self._forward, Arguments(self._names[number], args, kwargs)
        attention, cache = self._attentions[number], given.cache
        if forward is None or cache is None:
            return None
        from compress.tokens.cache_layer import layer_mask

        index, mask = attention.layer_idx, given.get("attention_mask")
        layer = cache.layers[index] if index < len(cache.layers) else None
        if getattr(layer, "valid", None) is not None:
            mask = layer_mask(mask, layer, given.get("hidden_states").shape[1], self.heads)
            given.put("attention_mask", mask)
        if forward.prompt is not None:
            rotation = given.get("position_embeddings")
            forward.observed = Observed(
                attention, self.heads, self.key_heads, mask, rotation, past=0, past_keys=None
            )
        return given.args, given.kwargs

    def _catch(self, name: str, module: Any, args: Any, output: torch.Tensor) -> None:
        forward = self._forward
        if forward is not None and forward.observed is not None:
            forward.observed.outputs[name] = output.detach()

    def _leave(self, order: int, number: int, module: Any, args: Any, kwargs: Any, _: Any) -> None:
        """After a layer, when nothing more is wanted of its part of the cache: cut it."""
        forward = self._forward
        if forward is None or forward.prompt is None or forward.observed is None:
            return
        from compress.tokens.cache_layer import slots_of, stored_bytes

        layers = Arguments(self._names[number], args, kwargs).cache.layers
        index = self._attentions[number].layer_idx
        before, observed = stored_bytes(layers[index]), forward.observed
        layers[index] = compress_layer(layers[index], order, forward.prompt, observed, self.policy)
        forward.observed = None
        forward.sizes.append((slots_of(layers[index]), before, stored_bytes(layers[index])))


def _check(cache: Any, mask: Any, implementation: str) -> None:
    """Raise `BadInput` for a prompt whose cache would not be compressed rightly."""
    import torch
    from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

    from compress.tokens.cache_layer import CompressedLayer

    if torch.compiler.is_compiling():
        raise BadInput("caches of a compiled model are not compressed: hooks change shapes")
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    kinds |= {getattr(cache, "layer_class_to_replicate", None) or DynamicLayer}
    strange = [kind.__name__ for kind in kinds - {DynamicLayer, CompressedLayer}]
    strange += ["offloaded layers"] if getattr(cache, "offloading", False) else []
    if strange or isinstance(cache, EncoderDecoderCache):
        raise BadInput(
            "a cache of this kind is not compressed",
            got=" of ".join([type(cache).__name__, *strange]),
            expected="a DynamicCache",
            mend="leave cache_implementation out",
        )
    if implementation not in _IMPLEMENTATIONS:
        raise BadInput(
            "caches for this attention are not compressed: its masks cannot be remapped",
            got=implementation,
            expected=", ".join(_IMPLEMENTATIONS),
            mend="model.set_attn_implementation('sdpa')",
        )
    if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2):
        raise BadInput(
            "the padding of a prompt must be known",
            where="attention_mask",
            got=f"{mask.ndim} dimensions" if torch.is_tensor(mask) else type(mask).__name__,
            expected="[rows, length], 0 for padding",
        )


def _refuse_assistance(*args: Any, **kwargs: Any) -> None:
    raise BadInput(
        "with assisted decoding caches are not compressed: guesses would count as a prompt",
        mend="generate without an assistant, or detach first",
    )
