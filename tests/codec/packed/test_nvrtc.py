"""Cubins: what NVRTC makes of the kernels, and the cache around it. No GPU is needed."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compress.codec.packed import nvrtc
from compress.errors import BadInput, Missing
from compress.paths import data_dir

HEADER = b"#pragma once\nconstexpr int answer = 42;\n"
KERNEL = b'#include "h.h"\nextern "C" __global__ void say(int* out) { *out = answer; }\n'


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    nvrtc.compiler.cache_clear()
    yield
    nvrtc.compiler.cache_clear()


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of kernels of our own, and an empty cache."""
    directory = tmp_path / "kernels"
    directory.mkdir()
    (directory / "h.h").write_bytes(HEADER)
    (directory / "k.cu").write_bytes(KERNEL)
    monkeypatch.setattr(nvrtc, "data_dir", lambda name: tmp_path / name)
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))
    return directory


class Fake:
    """A compiler that counts, and makes something of everything that it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str = "NVRTC 0.1") -> None:
        self.calls: list[tuple[str, str]] = []
        self.patch = monkeypatch
        self.become(version)

    def become(self, version: str) -> None:
        made = nvrtc.Compiler(version, self._compile)
        self.patch.setattr(nvrtc, "compiler", _cached(lambda: made))

    def _compile(self, source: bytes, name: str, arch: str) -> bytes:
        self.calls.append((name, arch))
        return b"\x7fELF" + bytes(1000) + source + arch.encode()


def _cached(get: Callable[[], nvrtc.Compiler]) -> Callable[[], nvrtc.Compiler]:
    get.cache_clear = lambda: None  # type: ignore[attr-defined]
    return get


@pytest.fixture
def real() -> nvrtc.Compiler:
    try:
        return nvrtc.compiler()
    except Missing as missing:
        pytest.skip(str(missing))


def test_a_cubin_is_made_once_and_then_read(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch)
    first = nvrtc.cubin("k.cu", "90")
    assert first.endswith(KERNEL + b"90")
    assert nvrtc.cubin("k.cu", "90") == first
    assert fake.calls == [("k.cu", "90")]


def test_all_that_could_change_a_cubin_is_in_its_key(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch)
    nvrtc.cubin("k.cu", "90")
    nvrtc.cubin("k.cu", "80")
    fake.become("NVRTC 0.2")
    nvrtc.cubin("k.cu", "90")
    (kernels / "h.h").write_bytes(HEADER + b'#include "deep.h"\n')
    (kernels / "deep.h").write_bytes(b"")
    nvrtc.cubin("k.cu", "90")
    (kernels / "deep.h").write_bytes(b"\n")
    nvrtc.cubin("k.cu", "90")
    (kernels / "k.cu").write_bytes(KERNEL + b"\n")
    nvrtc.cubin("k.cu", "90")
    for text in ("fast", "dense", "fast"):
        nvrtc.cubin("k.cu", "90", {"EP_LAYOUT": text})
    assert len(fake.calls) == 8


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data + b"0", lambda _: b""]
)
def test_a_damaged_cubin_is_made_again(
    damage: Callable[[bytes], bytes], kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch)
    good = nvrtc.cubin("k.cu", "90")
    [path] = (kernels.parent / "cache" / "cuda").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert nvrtc.cubin("k.cu", "90") == good
    assert len(fake.calls) == 2
    assert path.read_bytes() == whole


def test_many_may_write_the_same_cubin_at_once(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: nvrtc.cubin("k.cu", "90"), range(64)))
    assert len(made) == 1
    assert fake.calls
    assert [path.suffix for path in (kernels.parent / "cache" / "cuda").iterdir()] == [".cubin"]


def test_a_cache_that_cannot_be_written_costs_only_time(
    kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch)
    (kernels.parent / "cache").write_bytes(b"a file")
    assert nvrtc.cubin("k.cu", "90") == nvrtc.cubin("k.cu", "90")
    assert len(fake.calls) == 2


def test_every_kernel_finds_what_it_includes() -> None:
    for path in data_dir("kernels").glob("*.cu"):
        names = list(nvrtc.sources(path.name))
        assert names[0] == path.name
        assert "lanes.h" in names


def test_real_cubins(kernels: Path, real: nvrtc.Compiler) -> None:
    binary = nvrtc.cubin("k.cu", "90")
    assert binary.startswith(b"\x7fELF")
    assert b"say" in binary
    assert nvrtc.cubin("k.cu", "75") != binary


def test_what_the_compiler_refuses_is_told_in_one_line(kernels: Path, real: nvrtc.Compiler) -> None:
    (kernels / "k.cu").write_bytes(b"\n\nextern void broken(\n")
    with pytest.raises(BadInput, match=r"^k\.cu: NVRTC .* sm_90, got k\.cu\(\d\): error: .*; "):
        nvrtc.cubin("k.cu", "90")
    (kernels / "k.cu").write_bytes(KERNEL)
    with pytest.raises(BadInput, match=r"sm_999, got nvrtc: error: invalid value for --gpu-arch"):
        nvrtc.cubin("k.cu", "999")
    assert not (kernels.parent / "cache").exists()


def test_only_the_products_that_are_wanted_are_compiled(
    real: nvrtc.Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path))
    binary = nvrtc.cubin("linear.cu", "90", {"EP_LAYOUT": "dense", "EP_DTYPE": "fp16"})
    made = {name.decode() for name in re.findall(rb"\.text\.(linear_\w+)\0", binary)}
    assert made == {f"linear_dense_fp16_{most}" for most in (1, 2, 4, 8)}
    with pytest.raises(BadInput, match=r"got linear\.cu\(1\d\d\): error"):
        nvrtc.cubin("linear.cu", "90", {"EP_LAYOUT": "dence", "EP_DTYPE": "fp16"})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["75", "90"])
def test_nvrtc_compiles_every_kernel(
    arch: str, real: nvrtc.Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path))
    for path in data_dir("kernels").glob("*.cu"):
        assert nvrtc.cubin(path.name, arch).startswith(b"\x7fELF")


def test_cuda_core_makes_the_same_cubin(
    kernels: Path, real: nvrtc.Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.core")
    direct = nvrtc.cubin("k.cu", "90")
    nvrtc.compiler.cache_clear()
    monkeypatch.setattr(nvrtc, "_libraries", lambda: iter(()))
    try:
        other = nvrtc.compiler()
    except Missing:
        pytest.skip("cuda.core finds no NVRTC")
    if other.name != f"{real.name} through cuda.core":
        pytest.skip(f"cuda.core found {other.name}, not {real.name}")
    assert nvrtc.cubin("k.cu", "90") == direct
    with pytest.raises(BadInput, match="sm_999, got nvrtc: error: invalid value"):
        nvrtc.cubin("k.cu", "999")


@pytest.mark.parametrize(
    ("version", "package"),
    [("12.8", "nvidia-cuda-nvrtc-cu12"), ("13.0", "nvidia-cuda-nvrtc==13.*")],
)
def test_without_nvrtc_the_right_package_is_named(
    version: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def nothing(path: str) -> None:
        raise OSError(path)

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(ctypes, "CDLL", nothing)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(Missing) as caught:
        nvrtc.compiler()
    assert str(caught.value).endswith(f"; pip install '{package}'")
    assert caught.value.exit_code == 3


def test_an_nvrtc_of_another_cuda_than_torch_s_is_not_taken(
    real: nvrtc.Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    nvrtc.compiler.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    with pytest.raises(Missing, match=r"libnvrtc\.so\.99"):
        nvrtc.compiler()
