"""Before layer K: ask the selector about each segment."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.tokens.forward import Forward
from compress.tokens.plan import Run
from compress.tokens.segment import KeptSegment, Segment, Selector

if TYPE_CHECKING:
    import torch

_SEED_STEP = 1_000_003  # a prime above any length, so that segments do not share their seeds


def select_tokens(
    forward: Forward, state: torch.Tensor, seed: int, selector: Selector
) -> tuple[torch.Tensor, tuple[KeptSegment, ...]]:
    """bool [rows, length]: who goes on of ``state`` [rows, length, D]; and what became of segments.

    For a forward with a plan, whose layer K-1 has run. Raises `BadInput` for a selector's answer of
    another shape or dtype. Nothing here waits for the device.
    """
    import torch

    plan, attended = forward.plan, forward.attended
    if plan is None or attended is None:
        raise RuntimeError("nothing is planned for this forward")
    keep = (~plan.candidates).to(state.device)
    others = plan.real & ~plan.candidates
    texts: dict[int, torch.Tensor] = {}
    segments = []
    with torch.no_grad():
        for run in plan.runs:
            row, start, stop = place = run.row, run.start, run.stop
            if row not in texts:
                texts[row] = state[row, others[row].nonzero().flatten().to(state.device)].detach()
            segment = Segment(
                hidden=state[row, start:stop].detach(),
                query=attended.queries(*place),
                text=texts[row],
                seed=seed * _SEED_STEP + run.before,
                last_attention=partial(attended.last, row, plan.last[row], start, stop),
                mutual_attention=partial(attended.mutual, *place),
            )
            chosen = start + _ask(selector, segment, run)
            keep[row].index_fill_(0, chosen, True)
            past = forward.past
            segments.append(KeptSegment(row, start + past, stop - start, chosen + past))
    return keep, tuple(segments)


def _ask(selector: Selector, segment: Segment, run: Run) -> torch.Tensor:
    import torch

    if run.keep == run.stop - run.start:
        return torch.arange(run.keep, device=segment.hidden.device)
    chosen = selector(segment, run.keep)
    if chosen.shape != (run.keep,) or chosen.dtype != torch.int64:
        raise BadInput(
            "a selector gave something else than tokens",
            got=f"{chosen.dtype} {list(chosen.shape)}",
            expected=f"torch.int64 [{run.keep}]",
        )
    return chosen.to(segment.hidden.device)
