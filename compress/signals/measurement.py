"""What a model's blocks are worth: the scores, the orders of removal, and who agrees with whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.signals.collector import Part, check_scorers, collect
from compress.signals.table import (
    SCORERS_DEFAULT,
    BlockTable,
    Stability,
    protected_blocks,
    significant,
)
from compress.signals.text import windows

AGREE = 0.8


class CalibrationText(Protocol):
    """Which text to measure on: ``sequences`` windows of ``length`` tokens of ``data``."""

    @property
    def data(self) -> str: ...

    @property
    def sequences(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Measurement:
    """The outcome of `measure`: the table, and how to show it to people and programs.

    ``drop``: how many blocks the choice would be of whose stability is asked. ``granularity``: what
    of each block was scored, "block" for all of it.
    """

    table: BlockTable
    protected: frozenset[int]
    drop: int = 1
    granularity: str = "block"

    @property
    def header(self) -> tuple[str, ...]:
        """The titles of `rows`."""
        return ("block", *self.table.values, "note")

    def rows(self) -> list[tuple[str, ...]]:
        """A line per block: for each scorer the score, its standard error and its place in line."""
        table = self.table
        columns = []
        for scorer in table.values:
            order = table.order(scorer, self.protected)
            means, errors = table.means(scorer), table.errors(scorer)
            columns.append([_cell(means[i], errors[i], i, order) for i in range(table.blocks)])
        notes = [self._note(block) for block in range(table.blocks)]
        return list(zip(map(str, range(table.blocks)), *columns, notes, strict=True))

    def orders(self) -> dict[str, list[int]]:
        """By scorer the blocks that it would remove, the first to go first."""
        return {scorer: self.table.order(scorer, self.protected) for scorer in self.table.values}

    def agreement(self) -> dict[str, float | None]:
        """Spearman's rank correlation of each two scorers (`BlockTable.agreement`)."""
        return self.table.agreement(self.protected)

    def agreeing(self) -> list[str]:
        """The pairs ``"scorer/scorer"`` whose rank correlation is at least `AGREE`, best first."""
        pairs = [(rho, pair) for pair, rho in self.agreement().items() if rho and rho >= AGREE]
        return [pair for _, pair in sorted(pairs, key=lambda item: (-item[0], item[1]))]

    def stability(self) -> dict[str, Stability | None]:
        """By scorer, how firm its choice of ``drop`` blocks is (`BlockTable.stability`)."""
        return {
            scorer: self.table.stability(scorer, self.protected, self.drop)
            for scorer in self.table.values
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, the values of each sequence included."""
        return {
            "granularity": self.granularity,
            **summarize(self.table, self.protected),
            "drop": self.drop,
            "stability": {
                scorer: found and {"same_choice": found.same_choice, "ranks": found.ranks}
                for scorer, found in self.stability().items()
            },
            "values": {
                scorer: [[significant(value) for value in row] for row in rows]
                for scorer, rows in self.table.values.items()
            },
        }

    def _note(self, block: int) -> str:
        notes = (
            ("protected", block in self.protected),
            ("writes sink", self.table.writes_sink(block)),
        )
        return ", ".join(note for note, holds in notes if holds)


def measure(
    checkpoint: Checkpoint,
    calibration: CalibrationText,
    progress: Progress = SILENT,
    *,
    scorers: Sequence[str] = SCORERS_DEFAULT,
    drop: int = 1,
    granularity: str = "block",
    parts: Callable[[Any], Sequence[Part]] | None = None,
) -> Measurement:
    """Score the blocks of a model, decoder or encoder, compressed or not, by ``scorers``.

    ``drop`` and ``granularity``: see `Measurement`. ``parts`` finds in the loaded model what to
    score of each block, where that is not all of it. Raises `BadInput` where the model has no
    tokenizer or no single stack of blocks, and as ``parts``, `windows` and `collect` do.
    """
    check_scorers(scorers)
    tokens = windows(
        calibration.data,
        checkpoint.tokenizer(),
        calibration.sequences,
        calibration.length,
        calibration.seed,
    )
    model = load_float32(checkpoint)
    found = parts and parts(model)
    table = collect(model, tokens, parts=found, scorers=scorers, progress=progress)
    return Measurement(table, protected_blocks(table.blocks), drop, granularity)


def load_float32(checkpoint: Checkpoint) -> Any:
    """The model to measure on: on a CPU float32 is faster than bfloat16, and exact to compare.

    Raises `BadInput` for a model that reads no tokens, and what `Checkpoint.load_model` raises.
    """
    import torch

    import compress.hf  # noqa: F401  teaches transformers to read coded checkpoints

    model = checkpoint.load_model(dtype=torch.float32)
    if model.main_input_name != "input_ids":
        raise BadInput(
            "blocks are measured on text, which this model does not read",
            where=checkpoint.path,
            got=f"a model of {model.main_input_name}",
        )
    return model


def summarize(table: BlockTable, protected: frozenset[int]) -> dict[str, Any]:
    """The table without the single sequences' values, as plain data."""
    return {
        "blocks": table.blocks,
        "sequences": table.sequences,
        "scores": {scorer: table.means(scorer) for scorer in table.values},
        "standard_errors": {scorer: table.errors(scorer) for scorer in table.values},
        "orders": {scorer: table.order(scorer, protected) for scorer in table.values},
        "agreement": table.agreement(protected),
        "protected": sorted(protected),
        "sink_writers": [block for block in range(table.blocks) if table.writes_sink(block)],
    }


def _cell(mean: float, error: float | None, block: int, order: list[int]) -> str:
    place = f" #{order.index(block) + 1}" if block in order else ""
    spread = "" if error is None else f" ± {error:.2g}"
    return f"{mean:.4g}{spread}{place}"
