"""The emulator itself: what CUDA promises holds in it, and what a GPU would not survive is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compress.codec import native
from tests.codec.packed.simt import Emulator, LaunchFailed, kernels_of, preload

pytestmark = pytest.mark.skipif(
    native.compiler() is None, reason="no C++ compiler to build the emulator with"
)
ROOT = Path(__file__).resolve().parents[3]

SOUND = """
extern "C" __global__ void __launch_bounds__(64, 2) reverse(const float* x, float* y) {
  __shared__ float staged[64];
  staged[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}
#define KERNEL(name, T) \\
  extern "C" __global__ void name(T* out, int by, unsigned mask) { \\
    const unsigned lane = threadIdx.x % 32; \\
    const T mine = (T)(100 + lane); \\
    out[lane] = __shfl_sync(mask, mine, by); \\
    out[32 + lane] = __shfl_up_sync(~0u, mine, by); \\
    out[64 + lane] = __shfl_down_sync(~0u, mine, by, 16); \\
    out[96 + lane] = __shfl_xor_sync(~0u, mine, by); \\
  }
KERNEL(shuffle_int, int)
KERNEL(shuffle_double, double)
extern "C" __global__ void votes(unsigned* out) {
  const unsigned lane = threadIdx.x % 32;
  if (lane % 2) {
    out[lane] = __ballot_sync(0xAAAAAAAAu, lane > 15);
  } else {
    const int any = __any_sync(0x55555555u, lane == 8), all = __all_sync(0x55555555u, lane == 8);
    out[lane] = any * 2 + all;
  }
  __syncwarp();
}
extern "C" __global__ void where(unsigned* out, unsigned long long* sum) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block << 16 | thread;
  atomicAdd(sum, thread);
}
extern "C" __global__ void poison(unsigned* out) {
  __shared__ unsigned shared[32];
  out[blockIdx.x * 32 + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 7;
}
"""

# Each kernel takes (out, n); the message that its launch with 64 threads must give.
BROKEN = {
    "a barrier of some": ("if (threadIdx.x < n) __syncthreads();", 40, "deadlock.*40 wait there"),
    "two barriers": (
        "if (threadIdx.x < n) __syncthreads();\nelse __syncthreads();",
        *(32, "deadlock: thread 0 waits for its block.*32 wait there, 32 elsewhere"),
    ),
    "a lane that has gone": ("if (threadIdx.x == n) return; __syncwarp();", 3, "deadlock.*warp"),
    "a lane elsewhere": (
        "if (threadIdx.x % 32 < n) __syncwarp();\nelse __syncthreads();",
        *(16, "deadlock.*waits for its warp"),
    ),
    "a mask without itself": ("__ballot_sync(n, 1);", 1, "not in its own mask 0x1"),
    "a lane without part": (
        "if (threadIdx.x < n) out[0] = __shfl_sync(15u, 1, 9);",
        *(4, "lane 0 reads lane 9, which takes no part"),
    ),
    "misaligned": ("*(uint4*)(out + n) = {1, 2, 3, 4};", 2, "misaligned address"),
    "misaligned read": ("out[0] = __ldg((const uint2*)(out + n)).x;", 1, "misaligned address"),
    "beyond shared": ("__shared__ int s[40]; s[threadIdx.x + n] = 1;", 0, "thread 40: .*index 40"),
    "beyond registers": ("int s[4] = {}; out[0] = s[threadIdx.x];", 0, "index 4 beyond"),
    "shift": ("out[0] = 1u << (threadIdx.x + n);", 1, "thread 31: .*shift by 32"),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("simt") / "sound.cu", SOUND)


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def emulator(request: pytest.FixtureRequest, sound: Path) -> Emulator:
    return Emulator(sound.parent, [sound], backward=request.param)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    bodies = enumerate(code for code, _, _ in BROKEN.values())
    kernels = (
        f'extern "C" __global__ void broken_{i}(unsigned* out, unsigned n) {{\n{code}\n}}'
        for i, code in bodies
    )
    directory = tmp_path_factory.mktemp("broken")
    return Emulator(directory, [write(directory / "broken.cu", "\n".join(kernels))])


def test_the_source_tells_kernels_and_their_bounds(sound: Path) -> None:
    found = kernels_of(sound)
    assert list(found)[:3] == ["reverse", "shuffle_int", "shuffle_double"]
    assert found["reverse"] == "64"


def test_barriers_order_shared_memory(emulator: Emulator) -> None:
    x, y = np.arange(150, dtype=np.float32), np.zeros(150, np.float32)
    emulator.launch("reverse", 3, 50, [x, y])
    assert np.array_equal(y.reshape(3, 50), x.reshape(3, 50)[:, ::-1])


@pytest.mark.parametrize(("name", "dtype"), [("int", np.int32), ("double", np.float64)])
@pytest.mark.parametrize("by", [1, 5])
def test_shuffles_move_values(emulator: Emulator, name: str, dtype: type, by: int) -> None:
    out = np.zeros((4, 32), dtype)
    emulator.launch(f"shuffle_{name}", 1, 32, [out, by, 0xFFFFFFFF])
    lane = np.arange(32)
    up = np.where(lane < by, lane, lane - by)
    down = np.where(lane % 16 + by > 15, lane, lane + by)
    assert np.array_equal(out - 100, [np.full(32, by), up, down, lane ^ by])


def test_votes_are_of_those_in_the_mask(emulator: Emulator) -> None:
    out = np.zeros(32, np.uint32)
    emulator.launch("votes", 1, 32, [out])
    assert set(out[1::2]) == {0xAAAA0000}
    assert set(out[::2]) == {2}


def test_every_thread_of_a_grid_runs_once(emulator: Emulator) -> None:
    out, total = np.zeros((24, 30), np.uint32), np.zeros(1, np.uint64)
    emulator.launch("where", (2, 3, 4), (5, 3, 2), [out, total])
    blocks, threads = np.meshgrid(np.arange(24), np.arange(30), indexing="ij")
    assert np.array_equal(out, blocks << 16 | threads)
    assert total[0] == 24 * threads[0].sum()


def test_shared_memory_is_no_zero_and_no_other_block_s(emulator: Emulator) -> None:
    out = np.zeros(96, np.uint32)
    emulator.launch("poison", 3, 32, [out])
    assert set(out) == {0xA5A5A5A5}


def test_shared_memory_of_every_source_in_a_process_is_poisoned(sound: Path) -> None:
    for name in ("second.cu", "third.cu"):
        source, out = sound.with_name(name), np.zeros(32, np.uint32)
        source.write_text(f"{sound.read_text()}\n// {name}")
        Emulator(sound.parent, [source]).launch("poison", 1, 32, [out])
        assert set(out) == {0xA5A5A5A5}


@pytest.mark.parametrize("case", BROKEN)
def test_what_a_gpu_would_not_survive_is_told(broken: Emulator, case: str) -> None:
    _, n, message = BROKEN[case]
    name = f"broken_{list(BROKEN).index(case)}"
    with pytest.raises(LaunchFailed, match=f"{name}: block 0.*{message}"):
        broken.launch(name, 2, 64, [np.zeros(256, np.uint32), n])


def test_a_failed_launch_harms_no_later_one(emulator: Emulator, broken: Emulator) -> None:
    for _ in range(3):
        with pytest.raises(LaunchFailed):
            broken.launch("broken_0", 1, 64, [np.zeros(4, np.uint32), 40])
        test_barriers_order_shared_memory(emulator)


def test_a_race_shows_in_one_direction(tmp_path: Path) -> None:
    text = SOUND.replace("  __syncthreads();\n", "").replace("reverse", "race")
    source = write(tmp_path / "race.cu", text)
    x, results = np.arange(1, 51, dtype=np.float32), []
    for backward in (False, True):
        y = np.zeros(50, np.float32)
        Emulator(tmp_path, [source], backward=backward).launch("race", 1, 50, [x, y])
        results.append(np.array_equal(y, x[::-1]))
    assert not all(results)


@pytest.mark.parametrize(
    ("name", "block", "args", "error"),
    [
        ("reverse", 65, [None, None], LaunchFailed),
        ("reverse", 64, [None], TypeError),
        ("reverse", 64, [1, None], TypeError),
        ("votes", 32, [np.zeros((8, 8), np.uint32)[:, ::2]], TypeError),
        ("nothing", 32, [], TypeError),
        ("reverse", 0, [None, None], LaunchFailed),
    ],
)
def test_launches_that_cannot_be(
    emulator: Emulator, name: str, block: int, args: list[object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        emulator.launch(name, 1, block, args)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads by LD_PRELOAD")
@pytest.mark.parametrize("n", [31, 32])
def test_the_sanitizer_finds_accesses_outside(sound: Path, n: int) -> None:
    if (library := preload()) is None:
        pytest.skip("the C++ compiler has no AddressSanitizer")
    script = (
        "import sys, numpy; from pathlib import Path; from tests.codec.packed.simt import Emulator;"
        "source = Path(sys.argv[1]); out = numpy.zeros(int(sys.argv[2]), numpy.uint32);"
        "Emulator(source.parent, [source], sanitize=True).launch('votes', 1, 32, [out])"
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(
        [sys.executable, "-c", script, str(sound), str(n)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode == 0) == (n == 32), ran.stderr
    assert ("heap-buffer-overflow" in ran.stderr) == (n == 31)
