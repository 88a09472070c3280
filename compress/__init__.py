"""entropress: compress neural networks by entropy.

    import compress
    compress.run("lossless.yaml", "org/model", "out")

The verbs are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress import _autoload

__version__ = "0.1.0"

_VERBS = {
    "run": "compress.pipeline",
    "plan": "compress.pipeline",
    "decompress": "compress.pipeline",
    "verify": "compress.evaluate.verify",
    "inspect": "compress.evaluate.inspect",
    "measure": "compress.pipeline",
    "prove": "compress.proof",
    "skip_sublayers": "compress.hf",
}
__all__ = [
    "__version__",
    "decompress",
    "inspect",
    "measure",
    "plan",
    "prove",
    "run",
    "skip_sublayers",
    "verify",
]

if TYPE_CHECKING:
    from compress.evaluate.inspect import inspect
    from compress.evaluate.verify import verify
    from compress.hf import skip_sublayers
    from compress.pipeline import decompress, measure, plan, run
    from compress.proof import prove


_autoload.autoload()


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_VERBS[name]), name)
