"""Where the package's own data files are, and where it may keep what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir(name: str) -> Path:
    """The directory of ``kernels`` or ``recipes``: inside a wheel's package, beside a checkout's.

    A path, not `importlib.resources`: an editable install does not resolve data-only packages.
    """
    here = Path(__file__).resolve().parent
    return next(d for d in (here / name, here.parent / name) if d.is_dir())


def cache_dir() -> Path:
    """``$ENTROPRESS_CACHE``, else ``entropress`` in the user's cache directory; may not exist."""
    if own := os.environ.get("ENTROPRESS_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "entropress"
