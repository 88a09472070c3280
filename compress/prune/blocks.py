"""How many of a model's blocks, or of one part of them, may go."""

from __future__ import annotations

from collections.abc import Collection

from compress.errors import BadInput
from compress.signals import protected_blocks


def check_drop(
    units: int,
    drop: int,
    protect: Collection[int] | None = None,
    kinds: int = 1,
    where: str = "prune_blocks.drop",
) -> None:
    """Raise `BadInput` where fewer than ``drop`` units may go, or no block might be left of a kind.

    ``units``: the number of blocks, each of which has ``kinds`` units.
    """
    protected = protected_blocks(units, protect)
    most = kinds * (units - len(protected)) if protected else units - 1
    if drop > most:
        whole = f"{units} blocks" if kinds == 1 else f"{kinds * units} parts of {units} blocks"
        raise BadInput(
            f"cannot remove {drop} of {whole}, {len(protected)} of them protected",
            where=where,
            got=drop,
            expected=f"at most {most}",
        )
