"""Before a forward: which of its tokens are candidates, and in which segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.tokens.policy import TokenPolicy

if TYPE_CHECKING:
    import torch

    from compress.tokens.forward import Arguments


@dataclass(frozen=True)
class Run:
    """A segment's place: tokens ``start`` to ``stop`` of a row, ``keep`` of which are to stay.

    ``before``: how many tokens of its sequence, padding left out and earlier turns included, come
    before it. That is the same in a batch and alone, with a cache and without.
    """

    row: int
    start: int
    stop: int
    before: int
    keep: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All segments of a forward of [rows, length] tokens. Everything lies on the CPU.

    ``candidates``, ``real``: bool [rows, length], the latter all but the padding. By row: its
    ``last`` real token, and whether its first (``opens``) and last (``closes``) are candidates.
    ``longest`` and ``shortest``: how many tokens are left in the rows that keep most and fewest.
    """

    runs: tuple[Run, ...]
    candidates: torch.Tensor
    real: torch.Tensor
    last: tuple[int, ...]
    opens: tuple[bool, ...]
    closes: tuple[bool, ...]
    longest: int
    shortest: int

    def joins(self, closed: Sequence[bool]) -> bool:
        """Whether a segment goes on that an earlier forward, which ``closed`` so, began."""
        return any(one and other for one, other in zip(closed, self.opens, strict=False))


def make_plan(
    given: Arguments,
    shape: Sequence[int],
    policy: TokenPolicy,
    visual_ids: Sequence[int],
    visual_mask: torch.Tensor | None,
) -> Plan | None:
    """The segments of a forward of ``shape`` [rows, length]; None where it has no candidates.

    Reads ids and padding to the CPU, before anything is computed. Raises `BadInput` where visual
    tokens or padding cannot be told from others.
    """
    import torch

    rows, length = shape
    mask, cache = given.get("attention_mask"), given.cache
    plain = torch.is_tensor(mask) and mask.ndim == 2
    real = torch.ones(rows, length, dtype=torch.bool)
    before = torch.full((rows,), 0 if cache is None else cache.get_seq_length())
    if plain:
        attended = mask.bool().cpu()
        real, before = attended[:, -length:], attended[:, :-length].sum(1)
    if policy.target == "text":
        candidates = _prompt(real, before, policy)
    else:
        candidates = _visual(given, rows, length, visual_ids, visual_mask)
    candidates = candidates & real
    if not candidates.any():
        return None
    if mask is not None and not plain:
        raise BadInput(
            "the padding of a prompt to prune must be known",
            where="attention_mask",
            got=f"{mask.ndim} dimensions" if torch.is_tensor(mask) else type(mask).__name__,
            expected="[rows, length], 0 for padding",
        )
    return _plan(candidates, real, before, policy)


def _prompt(real: torch.Tensor, before: torch.Tensor, policy: TokenPolicy) -> torch.Tensor:
    """bool [rows, length]: the tokens of a text prompt between its sinks and its recent tokens."""
    rank = real.cumsum(1)  # from 1
    late = rank + before[:, None] > policy.sinks
    return late & (rank <= rank[:, -1:] - policy.recent)


def _visual(
    given: Arguments, rows: int, length: int, ids: Sequence[int], mask: torch.Tensor | None
) -> torch.Tensor:
    """bool [rows, length]: which tokens are visual."""
    import torch

    tokens = given.get("input_ids")
    if mask is not None and mask.shape[1] == length and rows % len(mask) == 0:
        return mask.bool().cpu().repeat_interleave(rows // len(mask), 0)  # of beams
    if tokens is None:
        raise BadInput(
            "visual tokens cannot be told from others by their embeddings",
            where="inputs_embeds",
            mend="pass input_ids, or set visual_mask [rows, length] of the engine",
        )
    return torch.isin(tokens.cpu(), torch.tensor(ids))


def _plan(
    candidates: torch.Tensor, real: torch.Tensor, before: torch.Tensor, policy: TokenPolicy
) -> Plan:
    rank = before[:, None] + real.cumsum(1) - 1
    left = [candidates.shape[1]] * len(candidates)
    runs = []
    for row, place in enumerate(candidates):
        tokens = place.nonzero().flatten().tolist()
        ends = [i + 1 for i, (one, other) in enumerate(pairwise(tokens)) if other > one + 1]
        for first, end in pairwise([0, *ends, len(tokens)] if tokens else []):
            start, stop = tokens[first], tokens[end - 1] + 1
            keep = policy.count(stop - start)
            runs.append(Run(row, start, stop, int(rank[row, start]), keep))
            left[row] -= stop - start - keep
    opening, closing = real.int().argmax(1), real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return Plan(
        runs=tuple(runs),
        candidates=candidates,
        real=real,
        last=tuple(closing.tolist()),
        opens=tuple(candidates.gather(1, opening[:, None])[:, 0].tolist()),
        closes=tuple(candidates.gather(1, closing[:, None])[:, 0].tolist()),
        longest=max(left),
        shortest=min(left),
    )
