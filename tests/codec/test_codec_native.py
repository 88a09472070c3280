"""What only the native library has: threads, instruction sets, compilation at first use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.codec import fallback, native
from compress.errors import Corrupt

pytestmark = pytest.mark.skipif(
    native.library()[0] is None, reason=f"native codec: {native.library()[1]}"
)
ROOT = Path(__file__).resolve().parents[2]


def weights(words: int, width: int = 2, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=words * width // 4 + 1).astype(np.float32)
    return values.view(np.uint8)[: words * width].copy()


def decode(coded: bytes, data: np.ndarray, width: int = 2, threads: int = 1) -> np.ndarray:
    out = np.zeros_like(data)
    native.decode(coded + bytes(8), len(coded), data.size // width, width, 1, 16, out, threads)
    return out


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_threads_change_nothing(width: int, threads: int) -> None:
    data = weights(1_300_000 // width, width)
    coded = bytes(native.encode(data, width, 1, threads))
    assert coded == bytes(fallback.encode(data, width, 1, 1))
    assert native.predict(data, width, 1, threads) == len(coded)
    assert np.array_equal(decode(coded, data, width, threads), data)


def test_callers_share_the_pool() -> None:
    data = weights(400_000)
    coded = bytes(native.encode(data, 2, 1, 2))
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            if not np.array_equal(decode(coded, data, threads=3), data):
                wrong.append(index)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    script = """
import os, signal, sys
import numpy as np
from compress.codec import native
data = (np.arange(3_000_000) % 251 % 7).astype(np.uint8)
coded = bytes(native.encode(data, 1, 0, 2))
out = np.zeros_like(data)
child = os.fork()
if child == 0:
    signal.alarm(20)
native.decode(coded + bytes(8), len(coded), data.size, 1, 0, 16, out, 2)
good = np.array_equal(out, data)
if child == 0:
    os._exit(0 if good else 1)
sys.exit(0 if good and os.waitpid(child, 0)[1] == 0 else 1)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False)
    assert run.returncode == 0


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bytes(isa: str) -> None:
    script = """
import hashlib, sys
import numpy as np
from compress.codec import native
digest = hashlib.sha256()
for width in (1, 2, 4, 8):
    data = np.random.default_rng(width).normal(size=90_000).astype(np.float32).view(np.uint8)
    coded = bytes(native.encode(data, width, 1, 1))
    out = np.zeros_like(data)
    native.decode(coded + bytes(8), len(coded), data.size // width, width, 1, 16, out, 1)
    assert np.array_equal(out, data)
    digest.update(coded)
print(native.isa(), digest.hexdigest())
"""

    def digest(limit: str) -> list[str]:
        environment = os.environ | {"ENTROPRESS_ISA": limit}
        run = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return run.stdout.split()

    chosen, found = digest(isa)
    if chosen not in (isa, "neon") and isa != "portable":
        pytest.skip(f"this processor has no {isa}")
    assert found == digest("")[1]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    width=st.sampled_from([1, 2, 4, 8]),
    words=st.integers(1, 5000),
    seed=st.integers(0, 9),
)
def test_damage_is_refused_or_harmless(
    data: st.DataObject, width: int, words: int, seed: int
) -> None:
    original = weights(words, width, seed)
    coded = bytearray(native.encode(original, width, 1, 1))
    bit = data.draw(st.integers(0, 8 * len(coded) - 1))
    coded[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt):
        decode(bytes(coded), original, width)


def test_where_the_damage_is_named() -> None:
    data = weights(200_000)
    coded = bytearray(native.encode(data, 2, 1, 1))
    coded[-1] ^= 0x10
    with pytest.raises(Corrupt, match="segment 0, block 3"):
        decode(bytes(coded), data)


def run_backend(environment: dict[str, str]) -> str:
    run = subprocess.run(
        [sys.executable, "-c", "from compress import codec; print(codec.backend())"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_without_a_compiler_the_fallback_works(tmp_path: Path) -> None:
    found = run_backend({"CXX": "/nonexistent/c++", "ENTROPRESS_CACHE": str(tmp_path)})
    assert found.startswith("numpy fallback")
    assert "compiler" in found


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    found = run_backend({"CXX": "false", "ENTROPRESS_CACHE": str(tmp_path)})
    assert "the compiler failed" in found
    assert not list(tmp_path.rglob("*.so"))
