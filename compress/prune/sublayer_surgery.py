"""Dropping the attention or the MLP of blocks in a checkpoint, file to file: no model is built.

What is dropped is written as zeros, so that every reader computes the model without it, and named
in ``config.json`` in transformers' own words for it (``per_layer_config``, ``skip``), so that one
who knows them (`compress.hf.skipping`) need not compute it at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint, NewTensor, TensorInfo, dense_config, rewrite
from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.fitness import BLOCK, Unit
from compress.prune.settings import block_count, model_config
from compress.prune.sublayers import ATTENTIONS, MLPS
from compress.prune.surgery import BlockStack, find_stack, stored_bytes

if TYPE_CHECKING:
    import torch

_OWN_KEY = "entropress_skip"
_OFFICIAL_KEY = "per_layer_config"
_PIECE = 1 << 24
_REFUSED = {
    "is_encoder_decoder": "encoder-decoder models have two stacks of blocks",
    "num_kv_shared_layers": "blocks use the keys and values of others",
    "scale_attn_by_inverse_layer_idx": "attention is scaled by a block's position",
}


def drop_sublayers(
    checkpoint: Checkpoint,
    attention: Collection[int],
    mlp: Collection[int],
    directory: Path,
    progress: Progress = SILENT,
    *,
    replace: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Checkpoint, list[str]]:
    """Write the checkpoint with the attention and the MLP of those blocks zeroed and named.

    All other tensors keep every bit, but for those of ``replace`` (see `remove_blocks`); norms
    stay, a zero passes through them. A coded checkpoint is decoded on the way. Whether a block may
    be taken apart is for `find_sublayers` to say. Returns the new checkpoint and the names of the
    tensors that are now zero. Raises `BadInput` as `find_stack`, for blocks that are not there,
    where no attention would be left, for a replacement that does not fit, and where tensors or
    config are not of a kind that is known.
    """
    config = skip_config(checkpoint.config, attention, mlp)
    infos = checkpoint.tensor_infos()
    stack = find_stack(infos, block_count(checkpoint.config))
    tensors = unit_tensors(infos, stack, ("attention", "mlp"))
    gone = [("attention", i) for i in attention] + [("mlp", i) for i in mlp]
    zeroed = {name for unit in gone for name in tensors[unit]}
    changed = [name for name in infos if name in zeroed]
    new = {name: stored_bytes(name, value, infos) for name, value in (replace or {}).items()}
    if lost := sorted(zeroed & new.keys()):
        raise BadInput("cannot replace a tensor of a dropped sublayer", where=lost[0])

    def survivor(info: TensorInfo) -> Iterator[NewTensor]:
        if info.name in zeroed:
            yield NewTensor(info.name, info.dtype, info.shape, _zeros(info.nbytes))
        else:
            chunks = [new[info.name]] if info.name in new else checkpoint.chunks(info.name)
            yield NewTensor(info.name, info.dtype, info.shape, chunks)

    dropped, _ = rewrite(
        checkpoint,
        directory,
        survivor,
        config=config,
        metadata={"format": "pt"} if checkpoint.coded else None,
        progress=progress,
        label="dropping sublayers",
    )
    return dropped, changed


def unit_tensors(
    names: Iterable[str], stack: BlockStack, kinds: Collection[str]
) -> dict[Unit, list[str]]:
    """By unit of those ``kinds`` ("block", "attention", "mlp") the names of its tensors.

    Raises `BadInput` where attention or MLP are asked for and not of a kind that is known.
    """
    children: list[defaultdict[str, list[str]]] = [defaultdict(list) for _ in range(stack.count)]
    for name in names:
        if (block := stack.block(name)) is not None:
            children[block][_child(name, stack.prefix)].append(name)
    found: dict[Unit, list[str]] = {}
    for block, parts in enumerate(children):
        where = f"{stack.prefix}.{block}"
        for kind in kinds:
            members = tuple(parts) if kind == BLOCK else _part(set(parts), kind, where)
            found[kind, block] = [name for child in members for name in parts[child]]
    return found


def skip_config(
    config: Mapping[str, Any], attention: Collection[int], mlp: Collection[int]
) -> dict[str, Any]:
    """The config that also names the attention and MLP of those blocks as skipped.

    As ``per_layer_config`` wherever transformers takes that, else as ``entropress_skip`` of the
    same form. Raises `BadInput` as `drop_sublayers`.
    """
    nested = isinstance(config.get("text_config"), dict)
    config = dense_config(dict(config))
    if "quantization_config" in config:
        raise BadInput("drop sublayers before quantizing", where="config.json")
    text = dict(config["text_config"] if nested else config)
    _check_fields(config)
    count = block_count(config)
    _check_blocks(count, {"attention": attention, "mlp": mlp})
    for key in (_OFFICIAL_KEY, _OWN_KEY):
        stated = {int(i): dict(fields) for i, fields in (text.get(key) or {}).items()}
        for block in sorted({*attention, *mlp}):
            now = {name for name, some in (("attention", attention), ("mlp", mlp)) if block in some}
            entry = stated.setdefault(block, {})
            entry["skip"] = sorted({*entry.get("skip", ()), *now})
        skipping = {**text, key: {str(i): stated[i] for i in sorted(stated)}}
        whole = {**config, "text_config": skipping} if nested else skipping
        if all("attention" in stated.get(i, {}).get("skip", ()) for i in range(count)):
            raise BadInput("no block would have attention", expected="one that keeps it")
        if key == _OWN_KEY or _is_read(whole, stated):
            break
    return whole


def _is_read(config: Mapping[str, Any], stated: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether transformers takes ``per_layer_config`` from this config and understands it."""
    try:
        text = model_config(config).get_text_config(decoder=True)
    except BadInput:
        return False
    layers = text.per_layer_config
    return all(layers[i].skip == entry["skip"] for i, entry in stated.items() if "skip" in entry)


def _check_fields(config: Mapping[str, Any]) -> None:
    whole = model_config(config)
    for part in (whole, whole.get_text_config(decoder=True)):
        for name, reason in _REFUSED.items():
            if value := getattr(part, name, None):
                raise BadInput(
                    f"attention and MLP cannot be removed apart: {reason}",
                    where="config.json",
                    got=f"{name} {value}",
                )


def _check_blocks(count: int, chosen: Mapping[str, Collection[int]]) -> None:
    for what, blocks in chosen.items():
        if unknown := sorted(block for block in blocks if not 0 <= block < count):
            raise BadInput(
                f"no such block to drop the {what} of",
                got=", ".join(map(str, unknown)),
                expected=f"0 to {count - 1}",
            )


def _child(name: str, prefix: str) -> str:
    """``self_attn`` of ``model.layers.3.self_attn.q_proj.weight``."""
    return name[len(prefix) + 1 :].split(".")[1]


def _part(children: set[str], kind: str, where: str) -> tuple[str, ...]:
    known, what = (ATTENTIONS, "attention") if kind == "attention" else (MLPS, "MLP")
    found: list[tuple[str, ...]] = [names for names in known if children.issuperset(names)]
    if len(found) != 1:
        raise BadInput(
            f"attention and MLP cannot be removed apart: no single {what} that is known",
            where=where,
            got=", ".join(sorted(children)),
        )
    return found[0]


def _zeros(nbytes: int) -> Iterator[bytes]:
    piece = bytes(min(nbytes, _PIECE))
    for start in range(0, nbytes, _PIECE):
        yield piece[: nbytes - start]
