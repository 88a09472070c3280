"""Which backend does the work, and what the user hears of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compress import codec
from compress.codec import backends, native
from compress.errors import BadInput, Missing


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("ENTROPRESS_BACKEND", "fallback")
    assert codec.backend() == "numpy fallback (forced by ENTROPRESS_BACKEND)"
    monkeypatch.setenv("ENTROPRESS_BACKEND", "nativ")
    with pytest.raises(BadInput, match="did you mean 'native'"):
        codec.backend()


@pytest.fixture
def _no_compiler(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: (None, "no C++ compiler"))
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_numpy_takes_over_and_says_why(monkeypatch):
    monkeypatch.delenv("ENTROPRESS_BACKEND", raising=False)
    assert codec.backend() == "numpy fallback (no C++ compiler)"
    assert codec.decode(b"".join(codec.encode("w", "U8", (3,), [b"abc"]))).tobytes() == b"abc"
    monkeypatch.setenv("ENTROPRESS_BACKEND", "native")
    with pytest.raises(Missing, match="no C\\+\\+ compiler; install"):
        codec.backend()


def test_threads_default_to_what_the_process_may_use():
    assert backends.threads_or_all(None) >= 1
    assert backends.threads_or_all(3) == 3
    assert backends.threads_or_all(0) == 1


def test_importing_the_codec_is_cheap():
    program = "import sys, compress.codec; sys.exit({'numpy', 'torch'} & {*sys.modules} != set())"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
