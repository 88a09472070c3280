"""A loss that is measured once for each candidate, also across interruptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint import dump_json, load_object, write_atomic
from compress.errors import BadInput, Corrupt
from compress.prune.fitness import Fitness, Removal

_MEND = "remove it to measure anew, or start again with --overwrite"
_Key = tuple[Removal, int | None]


class Remembered:
    """``fitness``, asked only for what it has not told yet.

    Searches are deterministic, so one whose losses stand in a ``journal`` (a JSON file, rewritten
    after each call that measured something) goes on where it was interrupted and ends as it would
    have. ``subject`` names what the losses are of.

    Raises `BadInput` for a journal of another subject, `Corrupt` for one that is none.
    """

    def __init__(self, fitness: Fitness, journal: Path | None = None, subject: str = "") -> None:
        self._fitness, self._journal, self._subject = fitness, journal, subject
        self._known: dict[_Key, float] = {}
        if journal and journal.exists():
            self._known = _read(journal, subject)

    def __call__(self, candidates: Sequence[Removal], tokens: int | None = None) -> list[float]:
        """The losses in the order of the candidates."""
        new = [each for each in dict.fromkeys(candidates) if (each, tokens) not in self._known]
        if new:
            losses = self._fitness(new, tokens)
            self._known.update(zip(((each, tokens) for each in new), losses, strict=True))
            if self._journal:
                write_atomic(self._journal, dump_json(self._document()))
        return [self._known[each, tokens] for each in candidates]

    def _document(self) -> dict[str, Any]:
        # Losses as text: JSON has no infinity.
        losses = [
            {"removed": sorted(removal), "tokens": tokens, "loss": repr(loss)}
            for (removal, tokens), loss in self._known.items()
        ]
        return {"subject": self._subject, "losses": losses}


def _read(journal: Path, subject: str) -> dict[_Key, float]:
    try:
        document = load_object(journal)
        found = document["subject"]
        known: dict[_Key, float] = {
            (frozenset((str(kind), int(i)) for kind, i in each["removed"]), each["tokens"]): float(
                each["loss"]
            )
            for each in document["losses"]
        }
    except (Corrupt, KeyError, TypeError, ValueError) as error:
        raise Corrupt(
            "not the journal of a search", where=journal, got=repr(error), mend=_MEND
        ) from None
    if found != subject:
        raise BadInput(
            "the journal is that of another search",
            where=journal,
            got=found,
            expected=subject,
            mend=_MEND,
        )
    return known
