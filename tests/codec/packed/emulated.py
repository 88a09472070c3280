"""The emulator as a fixture's value: kernels are built once for all workers of a run."""

from __future__ import annotations

import os

import pytest

from compress.codec import native
from tests.codec.packed.simt import Emulator


def shared_emulator(temporary: pytest.TempPathFactory) -> Emulator:
    if native.compiler() is None:
        pytest.skip("no C++ compiler to build the emulator with")
    base = temporary.getbasetemp()
    return Emulator((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "simt")
