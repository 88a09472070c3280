"""The scores of all blocks by all scorers, and the orders of removal that follow."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from compress.errors import BadInput
from compress.signals.entrodrop import ENTRODROP

SCORERS = (
    "knn_entropy",
    "bucket_entropy",
    "renyi_entropy",
    "gaussian_entropy",
    "matrix_entropy",
    "effective_rank",
    "nuclear_norm",
    "diffusion_entropy",
    "cosine",
    "norm_ratio",
    "angular",
    *ENTRODROP,
)
SCORERS_DEFAULT = ("knn_entropy", "bucket_entropy", "cosine", "norm_ratio")
_TAIL = 0.05  # on either side of a rank interval


@dataclass(frozen=True)
class Stability:
    """What a scorer's choice owes to the calibration sequences that were drawn.

    ``same_choice``: the share of resamples in which the scorer removes the same blocks. ``ranks``:
    for each block the first and last place in the order of removal, counted from 1, of the middle
    90 % of resamples; None for protected blocks.
    """

    same_choice: float
    ranks: list[tuple[int, int] | None]


@dataclass(frozen=True)
class BlockTable:
    """Scores by scorer, block and calibration sequence. A low score means: can be removed.

    All but ``cosine``, ``norm_ratio`` and ``angular`` are increases from a block's input to its
    output. ``sinks`` holds for each block and sequence how many tokens the block makes massive.
    """

    values: Mapping[str, Sequence[Sequence[float]]]
    sinks: Sequence[Sequence[int]]

    @property
    def blocks(self) -> int:
        return len(self.sinks)

    @property
    def sequences(self) -> int:
        return len(self.sinks[0])

    def means(self, scorer: str) -> list[float]:
        """The score of each block: its mean over sequences, to six significant digits."""
        return [significant(math.fsum(row) / len(row)) for row in self.values[scorer]]

    def errors(self, scorer: str) -> list[float | None]:
        """The standard error of each mean; None for a single sequence."""
        if self.sequences < 2:
            return [None] * self.blocks
        root = math.sqrt(self.sequences)
        return [significant(statistics.stdev(row) / root) for row in self.values[scorer]]

    def writes_sink(self, block: int) -> bool:
        """Whether the block makes a token massive in at least half of the sequences."""
        return 2 * sum(count > 0 for count in self.sinks[block]) >= self.sequences

    def order(self, scorer: str, protect: Collection[int] | None = None) -> list[int]:
        """The blocks in the order in which the scorer would remove them, protected ones left out.

        Lowest mean first, ties by index. Blocks that write an attention sink come last: the others
        depend on the sink, which the scores do not see since they leave out its token (`places`).
        """
        places, kept = self.places(scorer), protected_blocks(self.blocks, protect)
        candidates = (block for block in range(self.blocks) if block not in kept)
        return sorted(candidates, key=lambda block: (places[block], block))

    def places(self, scorer: str) -> list[tuple[bool, float]]:
        """By block what decides its place in `order`: whether it writes a sink, and its mean.

        EntroDrop's scores see the sinks, and its rule is the scores alone: False for all.
        """
        means, sees = self.means(scorer), scorer in ENTRODROP
        return [(not sees and self.writes_sink(block), mean) for block, mean in enumerate(means)]

    def merge(self, other: BlockTable) -> BlockTable:
        """The table of this one's sequences followed by those of ``other``.

        Raises `ValueError` where the two differ in blocks or scorers.
        """
        if self.blocks != other.blocks or self.values.keys() != other.values.keys():
            raise ValueError("tables of other blocks or scorers do not merge")
        return BlockTable(
            {scorer: _join(rows, other.values[scorer]) for scorer, rows in self.values.items()},
            _join(self.sinks, other.sinks),
        )

    def stability(
        self,
        scorer: str,
        protect: Collection[int] | None = None,
        drop: int = 1,
        *,
        resamples: int = 200,
        seed: int = 0,
    ) -> Stability | None:
        """How firm the choice of ``drop`` blocks is; None for a single sequence.

        None also where fewer blocks than ``drop`` may go: there is no choice. Bootstrap: the
        sequences are drawn anew with replacement, and `order` taken of each draw. With few
        sequences it is optimistic, as any bootstrap.
        """
        chosen = set(self.order(scorer, protect)[:drop])
        if self.sequences < 2 or len(chosen) < drop:
            return None
        chance = random.Random(seed)
        same, places = 0, [list[int]() for _ in range(self.blocks)]
        for _ in range(resamples):
            drawn = chance.choices(range(self.sequences), k=self.sequences)
            order = self._of(scorer, drawn).order(scorer, protect)
            same += set(order[:drop]) == chosen
            for place, block in enumerate(order, 1):
                places[block].append(place)
        return Stability(significant(same / resamples), [_interval(found) for found in places])

    def _of(self, scorer: str, drawn: Sequence[int]) -> BlockTable:
        """One scorer's table of the sequences ``drawn``."""
        rows = [[row[i] for i in drawn] for row in self.values[scorer]]
        return BlockTable({scorer: rows}, [[row[i] for i in drawn] for row in self.sinks])

    def agreement(self, protect: Collection[int] | None = None) -> dict[str, float | None]:
        """Spearman's rank correlation of each two scorers over the blocks that are not protected.

        By ``"scorer/scorer"``; None where a scorer gives all of them one score.
        """
        kept = protected_blocks(self.blocks, protect)
        scores = {
            scorer: [mean for block, mean in enumerate(self.means(scorer)) if block not in kept]
            for scorer in self.values
        }
        return {f"{a}/{b}": spearman(scores[a], scores[b]) for a, b in combinations(scores, 2)}


def protected_blocks(blocks: int, protect: Collection[int] | None = None) -> frozenset[int]:
    """The blocks never to remove: by default the first two and the last, as in EntroDrop.

    Raises `BadInput` for an index that no block has.
    """
    if protect is None:
        return frozenset(block for block in (0, 1, blocks - 1) if 0 <= block < blocks)
    for block in protect:
        if not 0 <= block < blocks:
            raise BadInput(
                "no such block to protect",
                where="protect",
                got=block,
                expected=f"0 to {blocks - 1}",
            )
    return frozenset(protect)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None where a side is constant."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return significant(statistics.correlation(_ranks(a), _ranks(b)), 4)


def significant(value: float, digits: int = 6) -> float:
    """``value`` to so many significant digits: the last ones of a float sum mean nothing."""
    return float(f"{value:.{digits}g}")


def _join(rows: Sequence[Sequence[Any]], more: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[*row, *further] for row, further in zip(rows, more, strict=True)]


def _interval(places: Sequence[int]) -> tuple[int, int] | None:
    ordered, cut = sorted(places), int(_TAIL * len(places))
    return (ordered[cut], ordered[-1 - cut]) if places else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
