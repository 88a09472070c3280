"""Not computing what a checkpoint says may be skipped.

A checkpoint with dropped sublayers holds zeros in their place and names them in its config
(``per_layer_config``: ``{"3": {"skip": ["attention"]}}``). transformers 5.23 reads that and
computes the zeros all the same; `skip_sublayers` takes them out of the loaded model. The quantizer
does so to every coded checkpoint that it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import logging

from compress.errors import BadInput, Corrupt, did_you_mean
from compress.hf.idle_norms import Trace
from compress.signals import find_blocks

_OWN_KEY = "entropress_skip"
_MODULES = {
    "attention": (("self_attn",), ("attn",), ("attention",), ("self_attention",)),
    "mlp": (("mlp",), ("feed_forward",), ("block_sparse_moe",), ("fc1", "fc2")),
}
_BY_POSITION = ("scale_attn_by_inverse_layer_idx", "num_kv_shared_layers")
_PLACES = ("layer_idx", "layer_id")  # under which a cache is asked
_TOKENS = 8
_WHOLE = "load the model whole: with EntropressConfig(skip=False), or without skip_sublayers"
_logger = logging.get_logger("transformers.entropress")  # below transformers', for its handlers


def skip_sublayers(model: Any) -> Any:
    """Take out of ``model``, in place, what its config names as skipped; returns it.

    For a model just loaded by `from_pretrained`, in eval mode. Its outputs stay bit for bit those
    of the model as loaded, which eight tokens are run for to prove; what is skipped costs neither
    time nor memory, and has no entry in caches, where the other attentions move up. A cache that
    `generate` or the caller made for all blocks is shortened at its first use. `state_dict` and
    `save_pretrained` give the zeros back, so a saved model is again one that every reader computes
    rightly. No attention weights and router logits are recorded of what is skipped.

    A second call, or a config that names nothing, changes nothing. Raises `BadInput` for a model of
    unknown structure, with attention that depends on its position, or not all on one device, and
    `Corrupt` where what is to be skipped is not zero. Whatever is raised, the model is as before.
    """
    skipped = skipped_parts(model.config)
    if not skipped or any(isinstance(module, _Skipped) for module in model.modules()):
        return model
    _check_in_one_place(model)
    blocks = find_blocks(model)
    if max(skipped) >= len(blocks):
        raise BadInput("a block to skip a part of is not there", got=max(skipped))
    kept = [i for i in range(len(blocks)) if "attention" not in skipped.get(i, ())]
    _check_positions(model.config, kept, len(blocks))
    names = {i: [_modules(blocks[i], i, what) for what in parts] for i, parts in skipped.items()}

    with ExitStack() as undo, torch.no_grad():  # buffers made here outlive it
        traces = {i: Trace(blocks[i], sum(parts, ()), undo) for i, parts in names.items()}
        expected = _run_twice(model)
        for i, parts in names.items():
            for norm in traces[i].stop():
                _set(getattr(blocks[i], norm), "forward", _unchanged, undo)
            for *first, last in parts:
                for name in first:
                    _set(blocks[i], name, _Skipped(getattr(blocks[i], name), None), undo)
                if (extra := traces[i].extra.get(last)) is None:
                    raise BadInput("a part to skip does not run", where=f"block {i}, {last}")
                _set(blocks[i], last, _Skipped(getattr(blocks[i], last), extra), undo)
        if len(kept) < len(blocks):
            _renumber(blocks, kept, undo)
            shorten = _Shorten(kept, len(blocks))
            hook = blocks[0].register_forward_pre_hook(shorten, with_kwargs=True)
            undo.callback(hook.remove)
        _set(model, "_load_pretrained_model", _load_adapter, undo)
        if not torch.equal(_run_twice(model), expected):
            raise BadInput(
                "its skipped parts do more than to add to the residual", where=type(model).__name__
            )
        undo.pop_all()
    return model


def skip_if_possible(model: Any) -> Any:
    """`skip_sublayers` for loaders: what it refuses stays whole, as right and slower; returns it.

    The reason is one warning to transformers' log.
    """
    try:
        return skip_sublayers(model)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        _logger.warning("what config.json names as skipped is computed all the same: %s", reason)
        return model


class _Skipped(nn.Module):
    """Adds nothing, and remembers of the module it stands for only what its zeros look like.

    ``extra``: how many values the module gives beside its output; None: its input is to pass.
    """

    def __init__(self, module: nn.Module, extra: int | None) -> None:
        super().__init__()
        self.extra = extra
        self.names = list(module.state_dict())
        for index, tensor in enumerate(module.state_dict().values()):
            # No elements, yet shape and dtype, and `to` moves and casts it.
            like = tensor.new_empty((0, *tensor.shape))
            self.register_buffer(f"like_{index}", like, persistent=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.extra is None:
            return hidden_states
        zeros = torch.zeros_like(hidden_states)
        return (zeros, *[None] * self.extra) if self.extra else zeros

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, like in zip(self.names, self.buffers(), strict=True):
            destination[prefix + name] = like.new_zeros(like.shape[1:])

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        missing, _, errors = lists
        missing.extend(prefix + name for name in self.names if prefix + name not in state)
        # Not only its own: an adapter may hold what was trained on the whole model.
        for key, tensor in state.items():
            if key.startswith(prefix) and tensor.any():
                errors.append(f"{key} is skipped and must be zero; {_WHOLE}")


def _load_adapter(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' loader, which would only report weights that have no place any more."""
    info, offloaded = type(model)._load_pretrained_model(model, *args, **kwargs)
    for name, module in model.named_modules():
        if isinstance(module, _Skipped):
            for key in info.unexpected_keys:
                if key.startswith(f"{name}."):
                    raise BadInput("has weights for what is skipped", where=key, mend=_WHOLE)
    return info, offloaded


class _Shorten:
    """A hook that leaves only the entries of blocks with attention in caches made for all."""

    def __init__(self, kept: Sequence[int], blocks: int) -> None:
        self.kept = kept
        self.blocks = blocks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("cache") is not None:
            raise BadInput("continuous batching pages caches for all blocks", mend="use generate()")
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache) and len(value.layers) == self.blocks:
                value.layers = [value.layers[i] for i in self.kept]


def _unchanged(hidden_states: torch.Tensor) -> torch.Tensor:
    """The ``forward`` of a norm whose output nobody uses; its weights stay, to be saved."""
    return hidden_states


def _set(owner: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute or a submodule until ``undo``."""
    if name in vars(owner) or name in owner._modules:
        undo.callback(setattr, owner, name, getattr(owner, name))
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def skipped_parts(config: Any) -> dict[int, list[str]]:
    """What a model's config names as skipped, by block: of "attention" and "mlp", in this order.

    Raises `BadInput` for a part of another name.
    """
    text = config.get_text_config(decoder=True)
    stated = {
        int(i): set(entry["skip"]) for i, entry in (getattr(text, _OWN_KEY, None) or {}).items()
    }
    if text.is_heterogeneous:
        for i, layer in enumerate(text.per_layer_config):
            stated[i] = stated.get(i, set()) | set(layer.skip)
    for i, parts in stated.items():
        if unknown := sorted(parts - set(_MODULES)):
            raise BadInput(
                "config.json skips an unknown part",
                where=f"block {i}",
                got=unknown[0],
                mend=did_you_mean(unknown[0], _MODULES),
            )
    return {i: [what for what in _MODULES if what in parts] for i, parts in stated.items() if parts}


def _check_in_one_place(model: Any) -> None:
    """Refuse hooks of accelerate and shards of tensor parallelism, which need every module."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    parallel = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if len(devices) > 1 or "meta" in devices or parallel:
        raise BadInput(
            "its weights are offloaded, or spread over devices",
            where=type(model).__name__,
            got=", ".join(sorted(devices)),
            expected="all on one",
        )


def _check_positions(config: Any, kept: Sequence[int], blocks: int) -> None:
    if not kept:
        raise BadInput("config.json skips the attention of every block")
    text = config.get_text_config(decoder=True)
    for name in _BY_POSITION:
        if len(kept) < blocks and getattr(text, name, None):
            raise BadInput("attention that depends on its position is not skipped", got=name)


def _modules(block: nn.Module, index: int, what: str) -> tuple[str, ...]:
    """The names of the modules, all zero, that are the part ``what`` of a block."""
    children = dict(block.named_children())
    found = [names for names in _MODULES[what] if all(name in children for name in names)]
    if len(found) != 1:
        raise BadInput(
            f"its {what} is not known", where=type(block).__name__, got=", ".join(children)
        )
    for name in found[0]:
        for key, tensor in children[name].state_dict().items():
            # By bytes, for -0.0 would be saved as 0.0.
            if tensor.reshape(-1).view(torch.uint8).any():
                raise Corrupt("is to be skipped and not zero", where=f"block {index}, {name}.{key}")
    return found[0]


def _run_twice(model: Any) -> torch.Tensor:
    """The last hidden states for a few tokens in two parts, the second reading the cache."""
    tokens = torch.arange(1, _TOKENS + 1) % model.get_input_embeddings().num_embeddings
    cache = DynamicCache(config=model.config)
    states = [
        model.base_model(input_ids=part, past_key_values=cache, use_cache=True)[0]
        for part in tokens[None].to(next(model.parameters()).device).split(_TOKENS // 2 + 1, 1)
    ]
    return torch.cat(states, 1)


def _renumber(blocks: nn.ModuleList, kept: Sequence[int], undo: ExitStack) -> None:
    """Give the attentions that are left consecutive places in the cache."""
    for place, i in enumerate(kept):
        for part in list(blocks[i].modules())[1:]:
            for name in _PLACES:
                if isinstance(getattr(part, name, None), int):
                    _set(part, name, place, undo)
