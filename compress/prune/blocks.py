"""Which blocks go."""

from __future__ import annotations

from collections.abc import Collection

from compress.errors import BadInput
from compress.signals import BlockTable, protected_blocks


def choose(
    table: BlockTable, scorer: str, drop: int, protect: Collection[int] | None = None
) -> list[int]:
    """The ``drop`` blocks that ``scorer`` would remove first (`BlockTable.order`), ascending.

    ``protect``: blocks that stay; None means the first two and the last. Raises as `check_drop`.
    """
    check_drop(table.blocks, drop, protect)
    return sorted(table.order(scorer, protect)[:drop])


def check_drop(
    blocks: int,
    drop: int,
    protect: Collection[int] | None = None,
    where: str = "prune_blocks.drop",
) -> None:
    """Raise `BadInput` where fewer than ``drop`` blocks may go, or none would be left."""
    protected = protected_blocks(blocks, protect)
    most = min(blocks - len(protected), blocks - 1)
    if drop > most:
        raise BadInput(
            f"cannot remove {drop} of {blocks} blocks, {len(protected)} of them protected",
            where=where,
            got=drop,
            expected=f"at most {most}",
        )
