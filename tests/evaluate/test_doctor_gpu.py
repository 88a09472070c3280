"""`doctor --gpu`: what it says of a GPU, and of the lack of one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.codec import packed
from compress.errors import BadInput, Missing
from compress.evaluate import doctor_gpu
from compress.evaluate.doctor import Finding, diagnose


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees an H200 on which all is well; nothing is run on it."""
    told = SimpleNamespace(
        name="NVIDIA H200",
        total_memory=140 << 30,
        multi_processor_count=132,
        major=9,
        minor=0,
        clock_rate=1_980_000,
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    monkeypatch.setattr(doctor_gpu, "driver_version", lambda: "580.1")
    monkeypatch.setattr(doctor_gpu, "copy_bandwidth", lambda device: 4300.0)
    monkeypatch.setattr(packed.cuda, "launcher", lambda device: None)
    monkeypatch.setattr(packed, "compiler", lambda: SimpleNamespace(name="NVRTC 13.0"))
    passed = packed.SelfTest(528, [])
    monkeypatch.setattr(packed, "self_test", lambda device, progress: passed)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "a.cubin").touch()
    monkeypatch.setattr(doctor_gpu, "cache_dir", lambda: tmp_path)


def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor_gpu.diagnose_gpu()}


def test_a_gpu_on_which_all_is_well(gpu: None, tmp_path: Path) -> None:
    told = found()
    assert all(finding.ok for finding in told.values())
    assert [finding.detail for finding in told.values()] == [
        "NVIDIA H200, 140 GiB, 132 multiprocessors, sm_90, driver 580.1, CUDA 13.0",
        "NVRTC 13.0",
        "4300 GB/s read and written at once, 1980 MHz: layout fast",
        f"1 in {tmp_path / 'cuda'}",
        "528 comparisons with the CPU, all equal to the bit",
    ]
    assert diagnose(gpu=True)[-1] == told["kernels"]
    assert "kernels" not in {finding.name for finding in diagnose()}


def test_a_torch_that_does_not_tell_the_clock(gpu: None) -> None:
    del torch.cuda.get_device_properties(torch.device("cuda", 0)).clock_rate
    assert found()["bandwidth"].detail == "4300 GB/s read and written at once"
    assert found()["kernels"].ok


def test_wrong_bits_are_a_fault(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = packed.SelfTest(528, ["unpacking zeros (fast, BF16): ...", "another"])
    monkeypatch.setattr(packed, "self_test", lambda device, progress: wrong)
    assert found()["kernels"].ok is False
    assert "2 of 528 wrong, the first: ['unpacking zeros" in found()["kernels"].detail


@pytest.mark.parametrize(
    "error", [BadInput("refused", where="unpack.cu"), RuntimeError("cuLaunchKernel: error 719")]
)
def test_kernels_that_do_not_run_are_a_fault(
    error: Exception, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(packed, "self_test", fail)
    *_, last = doctor_gpu.diagnose_gpu()
    assert last == Finding("kernels", False, str(error))


def test_without_nvrtc_it_says_what_to_install(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise Missing("no NVRTC", mend="pip install 'nvidia-cuda-nvrtc'")

    monkeypatch.setattr(packed, "compiler", none)
    assert list(found()) == ["gpu", "kernels"]
    assert found()["kernels"].detail.endswith("pip install 'nvidia-cuda-nvrtc'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_ends_with_one_line_and_3(
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_cli("doctor", "--gpu", "--json")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: gpu: ")
    told = json.loads(done.stdout)
    assert told["gpu"]["ok"] is False
    assert told["codec"]["ok"] is True


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_is_well() -> None:
    assert all(finding.ok for finding in doctor_gpu.diagnose_gpu())
