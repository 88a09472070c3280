"""lm-eval and what it uses draw bars, print and log while they work; we report in our own way."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from compress.progress import no_bars

_LOGGERS = ("lm_eval", "datasets", "transformers", "bitsandbytes")


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, nothing on stdout, logs from errors on; everything as it was afterwards."""
    from lm_eval import evaluator

    with ExitStack() as restored:
        restored.enter_context(redirect_stdout(io.StringIO()))
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            restored.callback(logger.setLevel, logger.level)
            logger.setLevel(max(logging.ERROR, logger.level))
        restored.enter_context(no_bars())
        # It would ask git about the working directory, and git complains on stderr.
        restored.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
