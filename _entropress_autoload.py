"""Entry point that torch calls when imported; through it `from_pretrained` knows the format.

A module of its own, under a name nobody else has: the package is called ``compress``, and so may be
a file beside somebody's script, which must be neither run nor blamed here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def autoload() -> None:
    """`compress._autoload.autoload`, if ``compress`` means this project; never raises."""
    try:
        spec = importlib.util.find_spec("compress")
        ours = Path(__file__).resolve().with_name("compress") / "__init__.py"
        if spec is not None and spec.origin and Path(spec.origin).resolve() == ours:
            from compress._autoload import autoload as install

            install()
    except Exception:  # an exception would break `import torch` for everybody
        return
