"""Where the shipped tasks get their documents: JSON Lines files next to this one.

lm-eval imports this file by its path (`custom_dataset: !function data.load`), so it is found, and
finds its files, from any working directory and needs no network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path(__file__).resolve().parent


def load(file: str, **_metadata: Any) -> dict[str, Dataset]:
    """The documents of ``file`` as the split ``test``; lm-eval passes the task's metadata as well.

    Raises BadInput when the file is not there.
    """
    from datasets import Dataset

    path = FOLDER / file
    if not path.is_file():
        raise BadInput("a shipped task's documents are missing", where=path, mend="install again")
    with path.open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}
