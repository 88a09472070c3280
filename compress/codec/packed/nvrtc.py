"""CUDA kernels, compiled by NVRTC when they are first wanted and kept as cubins.

NVRTC comes with every CUDA build of torch, as the package ``nvidia-cuda-nvrtc``. It is called by
its C interface: torch's own way to it (``torch.cuda._utils._nvrtc_compile``) is private and refuses
to work without a CUDA toolkit. Where the library is in no usual place, ``cuda.core`` looks further.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compress.errors import BadInput, Missing
from compress.paths import cache_dir, data_dir

_STANDARD = "c++17"
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Compiler:
    """``compile(source, name, arch)`` gives a cubin or raises `RuntimeError` with the log."""

    name: str
    compile: Callable[[bytes, str, str], bytes]


def cubin(name: str, arch: str, macros: Mapping[str, str] | None = None) -> bytes:
    """``kernels/NAME`` compiled for ``arch``, e.g. ``"90"``; from the cache if it is there.

    ``macros``: what is defined in front of the source. The cache's key covers them, every byte of
    the source and of what it includes, the architecture and the compiler's version. Raises
    `Missing` where there is no NVRTC, `BadInput` with the first error where it refuses, as an
    NVRTC older than the GPU does.
    """
    texts, made_by = sources(name), compiler()
    if macros:
        defined = "".join(f"#define {macro} {text}\n" for macro, text in macros.items())
        texts[name] = f"{defined}#line 1\n".encode() + texts[name]
    key = hashlib.sha256(repr((name, texts, arch, made_by.name, _STANDARD)).encode()).hexdigest()
    path = cache_dir() / "cuda" / f"{key[:32]}.cubin"
    if (cached := _read(path)) is not None:
        return cached
    try:
        binary = made_by.compile(texts[name], name, arch)
    except RuntimeError as error:
        raise BadInput(
            f"{made_by.name} cannot compile it for sm_{arch}",
            where=name,
            got=_first_error(str(error)),
            mend="install the newest torch for your CUDA, or load without a packed layout",
        ) from error
    with suppress(OSError):  # what cannot be kept is compiled again next time
        _write(path, binary)
    return binary


def sources(name: str) -> dict[str, bytes]:
    """``kernels/NAME`` and all that it includes, by name, in the order of first mention."""
    texts: dict[str, bytes] = {}
    waiting = [name]
    while waiting:
        if (name := waiting.pop(0)) not in texts:
            texts[name] = (data_dir("kernels") / name).read_bytes()
            waiting += [found.decode() for found in _INCLUDE.findall(texts[name])]
    return texts


@functools.cache
def compiler() -> Compiler:
    """The NVRTC that this process uses. Raises `Missing` where there is none."""
    if found := _nvrtc() or _cuda_core():
        return found
    major = _majors()[0]
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else f"nvidia-cuda-nvrtc=={major}.*"
    raise Missing(
        f"no NVRTC (libnvrtc.so.{major}), which compiles the CUDA kernels",
        mend=f"pip install '{package}'",
    )


def _majors() -> tuple[int, ...]:
    """Versions of CUDA whose cubins the driver surely takes: torch's; any where torch has none."""
    import torch

    return (int(torch.version.cuda.split(".")[0]),) if torch.version.cuda else (13, 12)


def _nvrtc() -> Compiler | None:
    for path in _libraries():
        with suppress(OSError):
            return _from_library(ctypes.CDLL(path))
    return None


def _libraries() -> Iterator[str]:
    for major in _majors():
        library = f"libnvrtc.so.{major}"
        yield library  # already loaded by torch, or on the loader's path
        for directory in filter(None, sys.path):
            for wheel in (f"cu{major}", "cuda_nvrtc"):
                path = Path(directory) / "nvidia" / wheel / "lib" / library
                if path.is_file():
                    yield str(path)


def _from_library(library: ctypes.CDLL) -> Compiler:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def check(status: int) -> None:
        if status:
            raise RuntimeError((library.nvrtcGetErrorString(status) or b"unknown").decode())

    def fetch(program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        check(getattr(library, f"nvrtcGet{what}")(program, data))
        return data.raw

    def compile(source: bytes, name: str, arch: str) -> bytes:
        given = (f"--gpu-architecture=sm_{arch}", f"--std={_STANDARD}", f"-I{data_dir('kernels')}")
        options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        program = ctypes.c_void_p()
        check(
            library.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None)
        )
        try:
            if status := library.nvrtcCompileProgram(program, len(given), options):
                log = fetch(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                check(status if not log.strip() else 0)
                raise RuntimeError(log)
            return fetch(program, "CUBIN")
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    return Compiler(f"NVRTC {major.value}.{minor.value}", compile)


def _cuda_core() -> Compiler | None:
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):  # not installed, or finds no NVRTC either
        return None
    if major not in _majors():
        return None

    def compile(source: bytes, name: str, arch: str) -> bytes:
        options = ProgramOptions(
            name=name, arch=f"sm_{arch}", std=_STANDARD, include_path=str(data_dir("kernels"))
        )
        try:
            return bytes(Program(source.decode(), "c++", options).compile("cubin").code)
        except Exception as error:  # its class is not public
            raise RuntimeError(str(error)) from error

    return Compiler(f"NVRTC {major}.{minor} through cuda.core", compile)


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _read(path: Path) -> bytes | None:
    """What `_write` put there, if it is there and whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, binary = data[:_DIGEST], data[_DIGEST:]
    return binary if hashlib.sha256(binary).digest() == digest else None


def _write(path: Path, binary: bytes) -> None:
    """Under a name of its own first: other processes may be writing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(binary).digest() + binary)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
