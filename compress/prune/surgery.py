"""Taking whole blocks out of a checkpoint, file to file: no model is built."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import FLOATS, Checkpoint, NewTensor, TensorInfo, rewrite
from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.settings import block_count, cut_config

if TYPE_CHECKING:
    import torch

_NUMBERED = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?=\.)")


@dataclass(frozen=True)
class BlockStack:
    """Where the blocks' tensors are: those of block ``i`` are named ``<prefix>.<i>.…``."""

    prefix: str
    count: int

    def block(self, name: str) -> int | None:
        """The block that a tensor belongs to."""
        if not name.startswith(f"{self.prefix}."):
            return None
        return int(name[len(self.prefix) + 1 :].split(".", 1)[0])

    def renumbered(self, name: str, block: int) -> str:
        """The tensor's name with its block's number replaced."""
        rest = name[len(self.prefix) + 1 :].split(".", 1)[1]
        return f"{self.prefix}.{block}.{rest}"


def find_stack(names: Iterable[str], count: int) -> BlockStack:
    """The outermost numbered list of ``count`` modules among tensor names.

    Its name ends in ``layers``, ``h``, ``blocks`` or ``layer``. Raises `BadInput` where there is
    none or more than one, or where further blocks or multi-token predictors stand beside it.
    """
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        if "mtp" in name.split("."):
            raise BadInput("blocks cannot be removed: multi-token prediction", where=name)
        for match in _NUMBERED.finditer(name):
            numbers[name[: match.start(1) - 1]].add(int(match[1]))
    found = [prefix for prefix, seen in numbers.items() if seen == set(range(count))]
    outer = [p for p in found if not any(p.startswith(f"{other}.") for other in found)]
    if len(outer) == 1:
        return BlockStack(outer[0], count)
    for prefix, seen in numbers.items():
        if not outer and seen > set(range(count)):
            raise BadInput(
                f"blocks cannot be removed: there are more than num_hidden_layers ({count})",
                where=f"{prefix}.{max(seen)}",
                expected="no num_nextn_predict_layers and the like",
            )
    raise BadInput(
        f"no single stack of {count} blocks among the tensors",
        got=", ".join(outer) or ", ".join(f"{p} ({len(s)})" for p, s in numbers.items()) or "none",
    )


def remove_blocks(
    checkpoint: Checkpoint,
    removed: Collection[int],
    directory: Path,
    progress: Progress = SILENT,
    *,
    replace: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Checkpoint, dict[str, str], list[str]]:
    """Write the checkpoint without the blocks ``removed``; the others move up and keep every bit.

    Except the tensors of ``replace``, by their names in the checkpoint: these are stored in place
    of what is there, rounded to its dtype. A coded checkpoint is decoded on the way.

    Returns the new checkpoint, by new name the old one of every tensor that was renamed, and the
    names of those that are gone. Raises `BadInput` for a replacement that has no place or does not
    fit into it, as `find_stack` and `cut_config`, and as `rewrite`.
    """
    infos = checkpoint.tensor_infos()
    stack = find_stack(infos, block_count(checkpoint.config))
    keep = [block for block in range(stack.count) if block not in removed]
    places = {old: new for new, old in enumerate(keep)}
    names: dict[str, str | None] = {}
    for name in infos:
        block = stack.block(name)
        if block is None:
            names[name] = name
        else:
            names[name] = stack.renumbered(name, places[block]) if block in places else None
    new = {name: stored_bytes(name, value, infos) for name, value in (replace or {}).items()}
    if gone := [name for name in new if names[name] is None]:
        raise BadInput("cannot replace a tensor of a removed block", where=gone[0])

    def survivor(info: TensorInfo) -> Iterator[NewTensor]:
        if name := names[info.name]:
            chunks = [new[info.name]] if info.name in new else checkpoint.chunks(info.name)
            yield NewTensor(name, info.dtype, info.shape, chunks)

    pruned, _ = rewrite(
        checkpoint,
        directory,
        survivor,
        config=cut_config(checkpoint.config, keep),
        metadata={"format": "pt"} if checkpoint.coded else None,
        progress=progress,
        label="removing blocks",
    )
    renamed = {new: old for old, new in names.items() if new and new != old}
    return pruned, renamed, [old for old, new in names.items() if new is None]


def stored_bytes(name: str, value: torch.Tensor, infos: Mapping[str, TensorInfo]) -> memoryview:
    """The bytes of a tensor that takes the place of the one of that name."""
    import torch

    info = infos.get(name)
    if info is None or info.dtype not in FLOATS or info.shape != value.shape:
        raise BadInput(
            "cannot replace a tensor",
            where=name,
            got=f"{list(value.shape)}",
            expected=f"{info.dtype} {list(info.shape)}" if info else "a tensor of that name",
        )
    stored = value.detach().cpu().to(getattr(torch, FLOATS[info.dtype])).contiguous()
    if not stored.isfinite().all():
        raise BadInput(f"the replacement is not finite in {info.dtype}", where=name)
    return memoryview(stored.view(torch.uint8).numpy())
