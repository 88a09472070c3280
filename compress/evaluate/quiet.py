"""lm-eval and what it uses draw bars, print and log while they work; we report in our own way."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

_LOGGERS = ("lm_eval", "datasets", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, nothing on stdout, logs from errors on; everything as it was afterwards."""
    with ExitStack() as restored:
        restored.enter_context(redirect_stdout(io.StringIO()))
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            restored.callback(logger.setLevel, logger.level)
            logger.setLevel(max(logging.ERROR, logger.level))
        restored.enter_context(_without_bars())
        yield


@contextmanager
def _without_bars() -> Iterator[None]:
    """tqdm reads its environment variable only once, when it is imported."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    draw = tqdm.__init__

    def draw_nothing(self: Any, *args: Any, **options: Any) -> None:
        draw(self, *args, **{**options, "disable": True})

    tqdm.__init__ = draw_nothing
    try:
        yield
    finally:
        tqdm.__init__ = draw
