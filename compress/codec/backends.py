"""Which implementation does the work."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, Protocol

from compress.errors import BadInput, Missing, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Buffer

VARIABLE = "ENTROPRESS_BACKEND"
_MOST_THREADS = 256


class Backend(Protocol):
    """What an implementation offers. ``data``, ``out``: contiguous uint8, ``width`` bytes a word.

    ``encode`` and ``predict`` take whole groups except at the tensor's end. ``decode`` raises
    `Corrupt` naming segment and block, but not the tensor.
    """

    NAME: str

    def encode(self, data: np.ndarray, width: int, rotate: int, threads: int) -> Buffer: ...

    def predict(self, data: np.ndarray, width: int, rotate: int, threads: int) -> int: ...

    def decode(
        self,
        buffer: Buffer,
        nbytes: int,
        words: int,
        width: int,
        rotate: int,
        block_log2: int,
        out: np.ndarray,
        threads: int,
    ) -> None: ...

    def crc32c(self, data: Buffer) -> int: ...


def choose() -> Any:
    """The `Backend` module in use. `Missing` if the one the environment forces cannot be had."""
    return _choose(os.environ.get(VARIABLE, ""))[0]


def backend() -> str:
    """The backend in use, for people: ``native (avx512)`` or ``numpy fallback (and why)``."""
    module, detail = _choose(os.environ.get(VARIABLE, ""))
    return f"{module.NAME} ({detail})"


def threads_or_all(threads: int | None) -> int:
    """``threads`` within reason, or as many as this process may run on."""
    if threads is not None:
        return min(max(1, threads), _MOST_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _choose(forced: str) -> tuple[Any, str]:
    if forced not in ("", "native", "fallback"):
        hint = did_you_mean(forced, ("native", "fallback"))
        raise BadInput(f"{VARIABLE}={forced} names no backend", mend=hint)
    reason = f"forced by {VARIABLE}"
    if forced != "fallback":
        from compress.codec import native

        library, reason = native.library()
        if library is not None:
            return native, native.isa()
        if forced == "native":
            raise Missing(
                f"the native codec cannot be had: {reason}",
                mend=f"install a C++ compiler or unset {VARIABLE}",
            )
    from compress.codec import fallback

    return fallback, reason
