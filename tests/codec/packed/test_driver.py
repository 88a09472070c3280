"""The driver's C interface, called as on a GPU: a library of our own stands for the driver."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.codec import native
from compress.codec.packed import cuda, driver, nvrtc
from compress.errors import BadInput, Missing

KERNEL = 0x123456789ABCDEF0
STREAM = 0x7FFF00112233


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if (command := native.compiler()) is None:
        pytest.skip("no C++ compiler on the path")
    source = Path(__file__).with_name("fake_libcuda.cpp")
    target = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    subprocess.run([*command, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of them; `guarded` lists the devices that it was asked to make current."""
    told = SimpleNamespace(capability=(9, 0), guarded=[])

    def guard(index: int) -> nullcontext:
        told.guarded.append(index)
        return nullcontext()

    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: told.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "device", guard)
    return told


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What was compiled."""
    asked = []

    def cubin(name: str, arch: str, macros: dict[str, str]) -> bytes:
        asked.append((name, arch, *(f"{macro}={text}" for macro, text in macros.items())))
        return b"\x7fELF\0" + bytes(64)

    monkeypatch.setattr(nvrtc, "cubin", cubin)
    return asked


@pytest.fixture
def launcher(
    library: ctypes.CDLL,
    gpus: SimpleNamespace,
    compiled: list,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[driver.CudaLauncher]:
    monkeypatch.setattr(driver, "_driver", lambda: library)
    driver.cuda_launcher.cache_clear()
    yield driver.cuda_launcher(1)
    driver.cuda_launcher.cache_clear()


def test_a_launch_reaches_the_driver_as_it_was_meant(
    launcher: driver.CudaLauncher, gpus: SimpleNamespace, compiled: list[tuple[str, ...]]
) -> None:
    told = torch.zeros(15, dtype=torch.int64)
    gpus.guarded.clear()
    launcher.launch("linear_fast_bf16_1", 1000, 512, [told, -5, 2**32 - 1, None], shared=77)
    assert told[0] == KERNEL
    assert told[1:9].tolist() == [1000, 1, 1, 512, 1, 1, 77, STREAM]
    assert told[9:13].tolist() == [-5, 2**32 - 1, 0, 1]
    assert told[13] == 71 << 32, "the device's own context"
    assert told[14] == 1, "retained once"
    assert set(gpus.guarded) == {1}
    assert compiled == [("linear.cu", "90", "EP_LAYOUT=fast", "EP_DTYPE=bf16")]


def test_a_source_is_compiled_once_for_all_its_kernels(
    launcher: driver.CudaLauncher, compiled: list[tuple[str, ...]]
) -> None:
    told = torch.zeros(15, dtype=torch.int64)
    for name in ("unpack_fast", "unpack_dense", "rows_fast", "unpack_fast", "pack_histogram"):
        launcher.launch(name, 1, 128, [told, 0, 0, None])
    assert compiled == [("unpack.cu", "90"), ("pack.cu", "90")]
    compiled.clear()
    for name in ("linear_fast_bf16_1", "linear_fast_bf16_8", "linear_dense_bf16_1"):
        launcher.launch(name, 1, 128, [told, 0, 0, None])
    assert [made[2:] for made in compiled] == [
        (f"EP_LAYOUT={layout}", "EP_DTYPE=bf16") for layout in ("fast", "dense")
    ]
    assert driver.cuda_launcher(1) is launcher


def test_what_was_prepared_is_there_when_it_is_launched(
    launcher: driver.CudaLauncher, compiled: list[tuple[str, ...]]
) -> None:
    launcher.prepare("linear_dense_fp16_8")
    assert compiled == [("linear.cu", "90", "EP_LAYOUT=dense", "EP_DTYPE=fp16")]
    compiled.clear()
    launcher.prepare("linear_dense_fp16_8")
    told = torch.zeros(15, dtype=torch.int64)
    launcher.launch("linear_dense_fp16_8", 1, 128, [told, 0, 0, None])
    assert told[0] == KERNEL
    assert not compiled


def test_the_driver_s_refusals_name_function_and_device(launcher: driver.CudaLauncher) -> None:
    with pytest.raises(RuntimeError, match=r"^cuModuleGetFunction on cuda:1: error 500, named sym"):
        launcher.launch("unpack_nothing", 1, 128, [])
    with pytest.raises(RuntimeError, match="cuModuleLoadData on cuda:1: error 200, device kernel"):
        launcher.load("other", lambda: b"no ELF")


def test_what_cannot_run_is_told_in_one_line_with_a_way_on(
    gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driver.architecture(0) == "90"
    gpus.capability = (7, 0)
    with pytest.raises(BadInput, match=r"^cuda:0, Some GPU: .*7\.0, expected 7\.5 or newer; .*CPU"):
        driver.architecture(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Missing, match="torch sees no CUDA device; .*CPU"):
        driver.architecture(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Missing, match="built without CUDA, got .*CPU"):
        driver.architecture(0)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(path: str) -> None:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", nothing)
    driver._driver.cache_clear()
    with pytest.raises(Missing, match=r"^no NVIDIA driver, got libcuda\.so\.1: cannot"):
        driver._driver()


def test_cuda_tensors_get_the_driver(launcher: driver.CudaLauncher) -> None:
    assert cuda.launcher(torch.device("cuda", 1)) is launcher
