"""A measurement shared out among the processes of `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from compress.errors import BadInput
from compress.signals.table import BlockTable


def share_out(sequences: int, measure: Callable[[range], BlockTable]) -> BlockTable:
    """The table of ``sequences`` sequences, of which each process measures a run.

    ``measure`` gives the table of the sequences in a range, which may be empty where there are more
    processes than sequences. All processes must call this, and all get the whole table in the order
    of the sequences; a `BadInput` that one of them raises, all raise. A process alone measures all.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return measure(range(sequences))
    rank, world = dist.get_rank(), dist.get_world_size()
    outcome: BlockTable | BadInput
    try:
        outcome = measure(range(sequences * rank // world, sequences * (rank + 1) // world))
    except BadInput as error:  # the others must not wait for what never comes
        outcome = error
    outcomes: list[BlockTable | BadInput | None] = [None] * world
    dist.all_gather_object(outcomes, outcome)
    tables = []
    for found in outcomes:
        if isinstance(found, BadInput):
            raise found
        if found is not None:
            tables.append(found)
    return reduce(BlockTable.merge, tables)
