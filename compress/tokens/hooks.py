"""The hooks that shorten a model's sequence at layer K and put its states back at the end."""

from __future__ import annotations

from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.signals import block_output
from compress.tokens.attention import Attended, count_heads, projections
from compress.tokens.families import Family, find_attention
from compress.tokens.forward import Arguments, Forward, check_layers, check_model, parameters
from compress.tokens.plan import make_plan
from compress.tokens.policy import TokenPolicy
from compress.tokens.remap import Held, Memory, all_of, only, pick, put_back, remap_mask
from compress.tokens.segment import PrefillReport, Selector
from compress.tokens.selection import select_tokens

if TYPE_CHECKING:
    import torch

_MARK = "_entropress_tokens"


def engine_of(decoder: Any) -> Engine | None:
    """The engine whose hooks a text stack carries, if any."""
    return getattr(decoder, _MARK, None)


class Engine:
    """The hooks of one model, from when it is made until `remove`.

    ``enabled``: whether prompts are pruned; caches pruned before go on in any case. ``report``: of
    the last prefill that had candidates. ``visual_mask``: bool [rows, length], which tokens are
    visual where prompts are given as embeddings; used by forwards of that length while it is set.
    """

    def __init__(self, model: Any, family: Family, policy: TokenPolicy, selector: Selector) -> None:
        self.policy = policy
        self.enabled = True
        self.report: PrefillReport | None = None
        self.visual_mask: torch.Tensor | None = None
        self._model, self._family, self._selector = model, family, selector
        self._forwards: dict[int, Forward] = {}  # by thread: a model may run in several
        self._names = [parameters(layer) for layer in family.layers]
        self._inputs = parameters(family.root)
        self._handles: list[Any] = []
        setattr(family.decoder, _MARK, self)
        try:
            self._hook()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take all hooks out; the model is as before. A second time does nothing."""
        if engine_of(self._family.decoder) is not self:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forwards.clear()
        vars(self._family.decoder).pop(_MARK, None)
        vars(self._model).pop("_get_candidate_generator", None)

    def _hook(self) -> None:
        root, layers, layer = self._family.root, self._family.layers, self._family.layer
        add = self._handles.append
        add(root.register_forward_pre_hook(self._begin, with_kwargs=True))
        add(root.register_forward_hook(self._end, always_call=True))
        add(layers[0].register_forward_pre_hook(self._enter, with_kwargs=True))
        add(layers[layer - 1].register_forward_pre_hook(self._watch, with_kwargs=True))
        for name, module in projections(find_attention(layers[layer - 1])).items():
            add(module.register_forward_hook(partial(self._catch, name)))
        for index in range(layer, len(layers)):
            shorten, lengthen = partial(self._shorten, index), partial(self._lengthen, index)
            add(layers[index].register_forward_pre_hook(shorten, with_kwargs=True))
            # Before the hooks that record hidden states, which are to be of full length.
            add(layers[index].register_forward_hook(lengthen, prepend=True))
        if hasattr(self._model, "_get_candidate_generator"):
            self._model._get_candidate_generator = _refuse_assistance

    @property
    def _forward(self) -> Forward | None:
        """This thread's; None outside of the model, as where gradients are checkpointed."""
        return self._forwards.get(get_ident())

    def _begin(self, module: Any, args: Any, kwargs: Any) -> None:
        """Before the model: find the segments among its ids."""
        import torch

        if torch.compiler.is_compiling():
            raise BadInput("a compiled model is not pruned: hooks change shapes inside of it")
        given = Arguments(self._inputs, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        plan, memory = None, Memory.of(given.cache)
        if self.enabled and tokens is not None and tokens.shape[1] > 1:
            shape, ids = tokens.shape[:2], self._family.visual_ids
            plan = make_plan(given, shape, self.policy, ids, self.visual_mask)
            visual = self.policy.target == "visual"
            if plan is not None and memory is not None and visual and plan.joins(memory.closes):
                raise BadInput(
                    "an image is split over two forwards, and could only be pruned in parts",
                    mend="feed each image whole",
                )
        configs = module.config, self._family.config
        if plan is not None or memory is not None:
            check_model(given, configs)
        records = given.asks("output_hidden_states", configs)
        self._forwards[get_ident()] = Forward(plan, records)

    def _end(self, module: Any, args: Any, output: Any) -> None:
        self._forwards.pop(get_ident(), None)

    def _enter(self, module: Any, args: Any, kwargs: Any) -> None:
        """Before layer 0. It keeps all tokens, so its mask has the right size in any case."""
        forward = self._forward
        if forward is None:
            raise BadInput(
                "the text stack of a pruned model was called by itself",
                mend="call the model, or detach first",
            )
        given = Arguments(self._names[0], args, kwargs)
        forward.mask, forward.cache = given.get("attention_mask"), given.cache
        forward.length = given.get("hidden_states").shape[1]
        forward.past = 0 if forward.cache is None else forward.cache.get_seq_length()
        memory = Memory.of(forward.cache)
        forward.active = forward.plan is not None or memory is not None
        if forward.active:
            check_layers(given, forward, self._family)
        if memory is not None:
            forward.held_before = memory.held(forward.past)

    def _watch(self, module: Any, args: Any, kwargs: Any) -> None:
        """Before layer K-1: note what its attention works with."""
        forward = self._forward
        if forward is None or forward.plan is None:
            return
        given = Arguments(self._names[self._family.layer - 1], args, kwargs)
        attention = find_attention(module)
        heads, key_heads = count_heads(attention, self._family.config)
        past = forward.cache.layers[attention.layer_idx] if forward.past else None
        forward.attended = Attended(
            attention,
            heads,
            key_heads,
            mask=given.get("attention_mask"),
            rotation=given.get("position_embeddings"),
            past=forward.past,
            past_keys=getattr(past, "keys", None),
        )

    def _catch(self, name: str, module: Any, args: Any, output: torch.Tensor) -> None:
        forward = self._forward
        if forward is not None and forward.attended is not None:
            forward.attended.outputs[name] = output.detach()

    def _shorten(self, index: int, module: Any, args: Any, kwargs: Any) -> Any:
        """Before layer K and each one after it: leave out the pruned tokens."""
        forward = self._forward
        if forward is None or not forward.active:
            return None
        given = Arguments(self._names[index], args, kwargs)
        state, first = given.get("hidden_states"), index == self._family.layer
        device = state.device
        if first:
            self._decide(forward, state)
        pruned = forward.plan is not None
        flash = "flash" in self._family.config._attn_implementation
        tokens = forward.new.index.to(device)

        def at(whole: torch.Tensor, dim: int) -> torch.Tensor:
            return pick(whole.to(device), tokens, dim)

        def remapped(mask: torch.Tensor | None) -> torch.Tensor | None:
            mask = mask if mask is None else mask.to(device)
            keys = forward.keys.to(device)
            return remap_mask(mask, tokens if pruned else None, keys, forward.length, flash)

        given.put("attention_mask", forward.once(forward.mask, remapped))
        if not pruned:
            return given.args, given.kwargs
        if first or forward.records:
            given.put("hidden_states", at(state, 1))
        rotation, places = given.get("position_embeddings"), given.get("position_ids")
        if rotation is not None:
            both = forward.once(rotation, lambda pair: tuple(at(part, -2) for part in pair))
            given.put("position_embeddings", both)
        if places is not None:
            # Flash attention takes gaps between positions for the seams of packed sequences.
            shorter = None if flash else forward.once(places, lambda whole: at(whole, -1))
            given.put("position_ids", shorter)
        return given.args, given.kwargs

    def _decide(self, forward: Forward, state: torch.Tensor) -> None:
        """Before layer K: who goes on, and whom the later layers hold from now on."""
        (rows, length), past, family = state.shape[:2], forward.past, self._family
        if forward.plan is None:
            forward.new = all_of(rows, 0, length, state.device)
        else:
            plan, forward.whole = forward.plan, state
            keep, segments = select_tokens(forward, state, self.policy.seed, self._selector)
            forward.new = only(keep, plan.longest, plan.shortest < plan.longest)
            after = len(family.layers) - family.layer
            lengths = (length,) * family.layer + (plan.longest,) * after
            self.report = PrefillReport(family.layer, lengths, segments, family.notes)
        forward.attended = None
        new = Held(forward.new.index + past, forward.new.valid, forward.new.ragged)
        before = forward.held_before
        if before is None:
            before = all_of(rows, 0, past, state.device)
        forward.keys = before.to(state.device).then(new) if past else new

    def _lengthen(self, index: int, module: Any, args: Any, output: Any) -> Any:
        """After the last layer: put the states in their places, and record what is cached."""
        forward = self._forward
        if forward is None or not forward.active:
            return None
        last = index == len(self._family.layers) - 1
        if last and forward.cache is not None:
            closes = None if forward.plan is None else forward.plan.closes
            total = forward.past + forward.length
            Memory.write(forward.cache, len(self._family.layers), forward.keys, total, closes)
        if forward.plan is None or not (last or forward.records):
            return None
        short, new = block_output(output), forward.new
        valid = new.valid.to(short.device) if new.ragged else None
        whole, tokens = forward.whole.to(short.device), new.index.to(short.device)
        whole = put_back(short, whole, tokens, valid)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _refuse_assistance(*args: Any, **kwargs: Any) -> None:
    raise BadInput(
        "assisted decoding is not pruned: its first forward mixes the prompt with guesses",
        mend="generate without an assistant, or detach first",
    )
