"""Trials of a search for a rate on disk, in a JSON file that is replaced atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint import dump_json, load_object, write_atomic
from compress.errors import BadInput, Corrupt

if TYPE_CHECKING:
    import torch

_MEND = "remove it to measure anew, or start again with --overwrite"


@dataclass(frozen=True)
class Trial:
    """``bits_per_weight``, scales counted, made the perplexity ``ratio`` times the model's own."""

    bits_per_weight: float
    ratio: float


class TrialJournal:
    """Trials by target, in a file that is rewritten with each new one, if there is to be one.

    ``subject`` names the model, ``arguments`` all else that a trial depends on (`digest`). Raises
    `BadInput` for a file of another search, `Corrupt` for one that is none.
    """

    def __init__(self, path: Path | None, subject: str, arguments: str) -> None:
        self._path, self._search = path, {"subject": subject, "arguments": arguments}
        self._known = _read(path, self._search) if path and path.exists() else {}

    def of(self, target: float, measure: Callable[[float], Trial]) -> Trial:
        """What is known of a target, or else is measured."""
        if target not in self._known:
            self._known[target] = measure(target)
            if self._path:
                write_atomic(self._path, dump_json({**self._search, "trials": self._entries()}))
        return self._known[target]

    def _entries(self) -> list[dict[str, str]]:
        # Numbers as text: JSON has no infinity.
        return [
            {key: repr(value) for key, value in {"target": target, **asdict(trial)}.items()}
            for target, trial in self._known.items()
        ]


def digest(tokens: torch.Tensor, **more: object) -> str:
    """SHA-256 of int64 ``tokens`` [sequences, length] and anything JSON can say."""
    content = hashlib.sha256(tokens.cpu().contiguous().numpy()).hexdigest()
    stated = json.dumps({"tokens": [list(tokens.shape), content], **more}, sort_keys=True)
    return hashlib.sha256(stated.encode()).hexdigest()


def _read(path: Path, search: dict[str, str]) -> dict[float, Trial]:
    try:
        document = load_object(path)
        found = {key: document[key] for key in search}
        known = {
            float(each["target"]): Trial(float(each["bits_per_weight"]), float(each["ratio"]))
            for each in document["trials"]
        }
    except (Corrupt, KeyError, TypeError, ValueError) as error:
        raise Corrupt(
            "not the journal of a search", where=path, got=repr(error), mend=_MEND
        ) from None
    if found != search:
        raise BadInput("the journal is that of another search", where=path, mend=_MEND)
    return known
