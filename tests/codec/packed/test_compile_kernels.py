"""The CUDA kernels compile for every architecture, and keep what they hold in registers."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from compress.codec import native
from compress.codec.packed import nvrtc
from compress.errors import Missing
from compress.paths import data_dir
from tests.codec.packed.simt import kernels_of

RESOURCES = Path(__file__).resolve().parents[3] / "benchmarks" / "resources.py"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
SOURCES = ("unpack", "linear", "pack")
MOST_SHARED = 48 << 10  # that a kernel has without asking for more

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ preprocessor")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")


@pytest.fixture
def resources() -> Iterator[ModuleType]:
    """The benchmark's script; its dataclass looks its module up while it is made."""
    spec = importlib.util.spec_from_file_location("benchmark_resources", RESOURCES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def test_all_kernels_and_architectures_are_told(resources: ModuleType) -> None:
    assert {f"{source}.cu" for source in SOURCES} == {
        path.name for path in data_dir("kernels").glob("*.cu")
    }
    assert resources.ARCHITECTURES == ARCHITECTURES


@needs_compiler
def test_every_kernel_says_how_many_threads_it_takes() -> None:
    """Else it may get too many registers for the blocks that it is launched in."""
    for source in SOURCES:
        for kernel, most in kernels_of(data_dir("kernels") / f"{source}.cu").items():
            assert "kMaxThreads" not in most, kernel


@needs_compiler
@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_nvcc_compiles_without_spills(resources: ModuleType, source: str, arch: str) -> None:
    path = data_dir("kernels") / f"{source}.cu"
    used = resources.measure(path, arch)
    assert set(used) == set(kernels_of(path))
    for kernel, usage in used.items():
        assert usage.spills == 0, f"{kernel} spills {usage.spills} bytes"
        assert usage.stack == 0, f"{kernel} keeps {usage.stack} bytes in local memory"
        assert usage.shared <= MOST_SHARED, kernel


@needs_nvcc
def test_what_nvcc_says_is_understood(resources: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "hungry.cu"
    source.write_text("""
extern "C" __global__ void __launch_bounds__(1024, 2) hungry(float* x, int n) {
  __shared__ float shared[100];
  float y[64];
#pragma unroll
  for (int i = 0; i < 64; i++) y[i] = x[i * n];
  shared[threadIdx.x % 100] = y[n];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; i++) x[i * n + 1] = y[i] * shared[i] + y[63 - i];
}""")
    (usage,) = resources.measure(source, "90").values()
    assert usage.spills + usage.stack > 0
    assert (usage.shared, usage.registers) == (400, 32)
    source.write_text("__global__ void broken( {}")
    with pytest.raises(RuntimeError, match="error"):
        resources.measure(source, "90")


def test_the_table_names_kernels_and_spills(resources: ModuleType) -> None:
    usage = resources.Usage
    measured = {("a", "80"): usage(40, 16, 0, 0), ("a", "90"): usage(32, 16, 8, 8)}
    lines = resources.table(measured, ["80", "90"])
    assert lines[-1] == "| `a` | 16 | 40 | 32 + 8 B spilled |"


@needs_compiler
@pytest.mark.parametrize(
    ("source", "arch"),
    [("pack", "90"), ("unpack", "75"), pytest.param("linear", "120", marks=pytest.mark.slow)],
)
def test_nvrtc_compiles_with_no_headers_but_ours(source: str, arch: str) -> None:
    try:
        compiler = nvrtc.compiler()
    except Missing as error:
        pytest.skip(str(error))
    path = data_dir("kernels") / f"{source}.cu"
    binary = compiler.compile(path.read_bytes(), path.name, arch)
    assert binary.startswith(b"\x7fELF")
    for kernel in kernels_of(path):
        assert f".text.{kernel}\0".encode() in binary
