"""``config.json`` of a model some of whose blocks are gone.

Every field that speaks of single blocks is rewritten for those that stay; one that seems to and is
not known is refused, since a loader would take it on trust and compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import BadInput

_COUNT = "num_hidden_layers"
_COUNTS = (_COUNT, "n_layer", "n_layers", "num_layers")  # names of older configs
_ONE_PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices")  # of the blocks that are special
_LEADING = (
    "first_k_dense_replace",
    "max_window_layers",
    "num_dense_layers",
)  # the first so many blocks are special
_BY_BLOCK = ("per_layer_config", "entropress_skip")  # by a block's number, as text
_SPARSE_STEP = "decoder_sparse_step"
_NOT_OF_BLOCKS = ("architectures", "id2label", "label2id")
_REFUSED = {
    "is_encoder_decoder": "encoder-decoder models have two stacks of blocks",
    "scale_attn_by_inverse_layer_idx": "attention is scaled by a block's position",
    "num_kv_shared_layers": "blocks use the keys and values of others",
    "hidden_size_per_layer_input": "every block has a slice of an embedding of its own",
    "attn_layer_period": "every so many blocks another kind follows",
    "expert_layer_period": "every so many blocks another kind follows",
    "moe_layer_start_index": "blocks have experts by their positions",
    "moe_layer_end_index": "blocks have experts by their positions",
    "cross_attention_layers": "some blocks look at images only",
    "block_types": "kinds of blocks follow one another in a cycle",
    "rescale_every": "the stream is rescaled every so many blocks",
}


def model_config(config: Mapping[str, Any]) -> Any:
    """What transformers makes of a ``config.json``, every default filled in.

    Raises `BadInput` where it knows no such model type or finds the config wrong.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    fields = {key: _value(value) for key, value in config.items() if key != "quantization_config"}
    kind = fields.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(
            f"transformers cannot read the config of model type {kind}: {error}",
            where="config.json",
        ) from error


def block_count(config: Mapping[str, Any]) -> int:
    """The number of blocks of the (text) model; `BadInput` where the config does not say."""
    count = getattr(model_config(config).get_text_config(decoder=True), _COUNT, None)
    if not isinstance(count, int):
        raise BadInput(
            "the config states no number of blocks", where="config.json", expected=_COUNT
        )
    return count


def cut_config(config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """The config of the same model with only the blocks ``keep``, ascending indices.

    Lists that a model derives from a pattern over positions, such as ``layer_types``, are written
    out. Raises `BadInput` naming the field that cannot be carried over.
    """
    nested = isinstance(config.get("text_config"), dict)
    stated = config["text_config"] if nested else config
    full = _every_field(config)
    _refuse(stated, full)
    cut = {key: value for key, value in stated.items() if key != "quantization_config"}
    cut |= {name: len(keep) for name in _COUNTS if name in stated} or {_COUNT: len(keep)}
    for name in _ONE_PER_BLOCK:
        if full.get(name):
            cut[name] = [full[name][i] for i in keep]
    if (full.get(_SPARSE_STEP) or 1) > 1 and "mlp_only_layers" in full:
        full["mlp_only_layers"] = _dense_blocks(full)
        cut[_SPARSE_STEP] = 1
    for name in _INDICES:
        if full.get(name) is not None:
            cut[name] = [new for new, old in enumerate(keep) if old in full[name]]
    for name in _LEADING:
        if full.get(name) is not None:
            cut[name] = sum(old < full[name] for old in keep)
    for name in _BY_BLOCK:
        by_block = {int(old): value for old, value in (stated.get(name) or {}).items()}
        cut.pop(name, None)
        if left := {str(j): by_block[i] for j, i in enumerate(keep) if i in by_block}:
            cut[name] = left
    whole = {**config, "text_config": cut} if nested else cut
    if (count := block_count(whole)) != len(keep):
        raise BadInput(
            "blocks cannot be removed: the config states their number in an unknown place",
            where=f"config.json of model type {config.get('model_type')}",
            got=f"{count} blocks after the cut",
            expected=len(keep),
        )
    return whole


def stale_patterns(config: Mapping[str, Any]) -> list[str]:
    """The written-out lists that a reader who derives them from a pattern would get wrong.

    transformers heeds the lists; readers that know only the pattern (some converters, older
    versions) must not be given such a model.
    """
    nested = isinstance(config.get("text_config"), dict)
    text = dict(config["text_config"] if nested else config)
    lists = {name: text.pop(name) for name in _ONE_PER_BLOCK if name in text}
    whole = {**config, "text_config": text} if nested else text
    derived = _every_field(whole)
    return [name for name, value in lists.items() if derived.get(name) != value]


def _every_field(config: Mapping[str, Any]) -> dict[str, Any]:
    """The (text) model's config with all defaults, the number of blocks under its usual name."""
    text = model_config(config).get_text_config(decoder=True)
    return {**text.to_dict(), _COUNT: getattr(text, _COUNT, None)}


def _value(stated: Any) -> Any:
    """A value as transformers reads it; an infinity is spelled ``{"__float__": "Infinity"}``."""
    if isinstance(stated, dict):
        if stated.keys() == {"__float__"}:
            return float(stated["__float__"])
        return {key: _value(value) for key, value in stated.items()}
    return [_value(value) for value in stated] if isinstance(stated, list) else stated


def _dense_blocks(full: Mapping[str, Any]) -> list[int]:
    """The blocks without experts where every ``decoder_sparse_step``-th one has some."""
    step = full[_SPARSE_STEP]
    return [i for i in range(full[_COUNT]) if i in full["mlp_only_layers"] or (i + 1) % step]


def _refuse(stated: Mapping[str, Any], full: Mapping[str, Any]) -> None:
    """Raise for every field whose meaning for single blocks is not known or cannot be kept."""
    fields = {**full, **stated}
    for name, reason in _REFUSED.items():
        if fields.get(name):
            raise BadInput(
                f"blocks cannot be removed: {reason}",
                where="config.json",
                got=f"{name} {fields[name]}",
            )
    known = (*_COUNTS, *_ONE_PER_BLOCK, *_INDICES, *_BY_BLOCK, *_NOT_OF_BLOCKS)
    for name, value in fields.items():
        if name in known or name.endswith(("token_id", "token_ids")):
            continue
        listed = isinstance(value, list | tuple) and len(value) == full[_COUNT]
        keyed = isinstance(value, dict) and value and all(str(key).isdigit() for key in value)
        if listed or keyed:
            raise BadInput(
                "blocks cannot be removed: an unknown field seems to have a value per block",
                where="config.json",
                got=name,
            )
