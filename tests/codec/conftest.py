"""Every backend under one interface: reference, numpy, and native where it can be built."""

from __future__ import annotations

import numpy as np
import pytest

from compress.codec import api, checksum, fallback, native, reference


class Reference:
    """The oracle with the interface of a backend."""

    NAME = "reference"

    def encode(self, data, width, rotate, threads):
        return reference.encode(data.tobytes(), width, rotate)

    def predict(self, data, width, rotate, threads):
        return len(reference.encode(data.tobytes(), width, rotate))

    def decode(self, buffer, nbytes, words, width, rotate, block_log2, out, threads):
        data = reference.decode(bytes(buffer[:nbytes]), words, width, rotate, block_log2)
        out[:] = np.frombuffer(data, np.uint8)

    def crc32c(self, data):
        return checksum.crc32c(data)


BACKENDS = {"reference": Reference(), "fallback": fallback, "native": native}


def _backend(name):
    if name == "native" and native.library()[0] is None:
        pytest.skip(f"no native library: {native.library()[1]}")
    return BACKENDS[name]


@pytest.fixture(scope="module", params=["reference", "fallback", "native"])
def backend(request):
    """A backend, which the public functions use too while the test runs."""
    chosen = _backend(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "choose", lambda: chosen)
        yield chosen


@pytest.fixture(scope="module", params=["fallback", "native"])
def fast_backend(request):
    """As `backend`, without the reference: for data of megabytes."""
    chosen = _backend(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "choose", lambda: chosen)
        yield chosen
