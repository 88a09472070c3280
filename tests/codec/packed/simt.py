"""CUDA kernels on the CPU: ``kernels/*.cu`` as they are, compiled with `simt.h` as plain C++.

An `Emulator` launches them on CPU tensors and numpy arrays as a CUDA launcher does on CUDA tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.codec import native
from compress.paths import data_dir

HERE = Path(__file__).parent
# No fused multiply-add but those that are written, -O1 for the sake of compile time.
FLAGS = "-O1 -g1 -std=c++17 -fPIC -U_FORTIFY_SOURCE -ffp-contract=off -Wall -Wno-unknown-pragmas"
CHECKS = "-fsanitize=alignment,bounds,shift"
MAIN = """#include "simt_builtins.h"
namespace {{
#include "{source}"
}}
static const simt::Kernel kernels[] = {{{entries}}};
extern "C" const char* simt_kinds(const char* name) {{
  const simt::Kernel* kernel = simt::find(kernels, name);
  return kernel ? kernel->kinds : nullptr;
}}
extern "C" const char* simt_launch(const char* name, const unsigned grid[3],
                                   const unsigned block[3], void** args, int backward) {{
  return simt::launch(simt::find(kernels, name), grid, block, args, backward);
}}
"""


class LaunchFailed(AssertionError):
    """A kernel did what a GPU would not survive, or only by luck."""


def kernels_of(source: Path) -> dict[str, str]:
    """The kernels of a ``.cu`` file, its macros expanded: by name the most threads of a block."""
    command = [*_compiler(), "-E", "-P", "-x", "c++", str(source)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    bounds = r"(?:__launch_bounds__\(([^,()]*)(?:,[^()]*)?\) )?"
    kernel = rf'extern "C" __global__ void {bounds}(\w+)\('
    found = re.findall(kernel, " ".join(text.split()))
    return {name: most or "simt::kMaxThreads" for most, name in found}


class Emulator:
    """Launches kernels of ``sources`` (default: all of ``kernels/``).

    Each source is built in ``directory`` when first used; several processes may share that.
    ``backward`` runs threads and blocks from the last to the first, which results must not show.
    ``sanitize`` builds with AddressSanitizer, whose library must have been preloaded (`preload`).
    """

    def __init__(
        self,
        directory: Path,
        sources: Sequence[Path] | None = None,
        *,
        backward: bool = False,
        sanitize: bool = False,
    ) -> None:
        self.directory = directory
        self.sources = list(sources or sorted(data_dir("kernels").glob("*.cu")))
        self.backward = backward
        self.sanitize = sanitize
        self._loaded: dict[Path, ctypes.PyDLL] = {}

    def launch(
        self, name: str, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[Any]
    ) -> None:
        """Run a kernel to its end.

        ``args``: contiguous CPU tensors, numpy arrays, ints, None for a null pointer. Raises
        `LaunchFailed` with one line, `TypeError` where the arguments are not the kernel's.
        """
        library = self._library(name)
        kinds = library.simt_kinds(name.encode()).decode()
        if len(kinds) != len(args):
            raise TypeError(f"{name}: {len(args)} arguments, expected {len(kinds)}")
        values = [_argument(kind, value, name) for kind, value in zip(kinds, args, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        error = library.simt_launch(
            name.encode(), _three(grid), _three(block), pointers, self.backward
        )
        if error is not None:
            raise LaunchFailed(f"{name}: {error.decode()}")

    @functools.cached_property
    def _sources_by_name(self) -> dict[str, Path]:
        return {name: source for source in self.sources for name in kernels_of(source)}

    def _library(self, name: str) -> ctypes.PyDLL:
        if name not in self._sources_by_name:
            raise TypeError(f"no kernel {name}, there are {', '.join(self._sources_by_name)}")
        source = self._sources_by_name[name]
        if source not in self._loaded:
            self._loaded[source] = _load(build(source, self.directory, sanitize=self.sanitize))
        return self._loaded[source]


def shared_directory(temporary: Any) -> Path:
    """Where all workers of a run keep what is built; ``temporary``: pytest's tmp_path_factory."""
    base = Path(temporary.getbasetemp())
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "simt"


def build(source: Path, directory: Path, *, sanitize: bool = False) -> Path:
    """The library of one ``.cu`` file, named by a digest of what it is made from."""
    found = (f"SIMT_KERNEL({name}, ({most}))" for name, most in kernels_of(source).items())
    main = MAIN.format(source=source, entries=", ".join(found))
    checks = [CHECKS, "-fsanitize=address"] if sanitize else [CHECKS]
    includes = ["-I", str(HERE), "-I", str(data_dir("kernels"))]
    digest = hashlib.sha256(f"{_compiler()}{FLAGS}{checks}{main}".encode())
    for file in (source, *sorted(HERE.glob("*.h")), *sorted(data_dir("kernels").glob("*.h"))):
        digest.update(file.read_bytes())
    target = directory / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}")
    text, compiled, linked = (part.with_suffix(part.suffix + end) for end in (".cpp", ".o", ".so"))
    text.write_text(main)
    # Linked apart, without the checks' own library: simt.h has what they call.
    steps = (
        [*FLAGS.split(), *checks, *includes, "-c", text, "-o", compiled],
        ["-shared", *checks[1:], compiled, "-o", linked],
    )
    for step in steps:
        ran = subprocess.run([*_compiler(), *step], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise LaunchFailed(f"{source.name} does not compile:\n{ran.stderr}")
    linked.replace(target)
    text.unlink()
    compiled.unlink()
    return target


def preload() -> Path | None:
    """AddressSanitizer's library, for ``LD_PRELOAD``; None where the compiler has none."""
    command = [*_compiler(), "-print-file-name=libasan.so"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def _compiler() -> list[str]:
    command = native.compiler()
    if command is None:
        raise LaunchFailed("no C++ compiler (c++, g++ or clang++) on the path")
    return command


def _load(path: Path) -> ctypes.PyDLL:
    library = ctypes.PyDLL(str(path))  # keeps the lock: the emulator's state is one for all threads
    library.simt_kinds.argtypes, library.simt_kinds.restype = [ctypes.c_char_p], ctypes.c_char_p
    three, pointers = ctypes.c_uint * 3, ctypes.c_void_p
    library.simt_launch.argtypes = [ctypes.c_char_p, three, three, pointers, ctypes.c_int]
    library.simt_launch.restype = ctypes.c_char_p
    return library


def _three(value: int | Sequence[int]) -> Any:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return (ctypes.c_uint * 3)(*sizes, *(1,) * (3 - len(sizes)))


def _argument(kind: str, value: Any, name: str) -> Any:
    if isinstance(value, int) and kind in "iq":
        if not -(2**31) <= value < 2**32 and kind == "i":
            raise TypeError(f"{name}: {value} does not fit 32 bits")
        return ctypes.c_uint32(value) if kind == "i" else ctypes.c_uint64(value)
    if kind == "p" and value is None:
        return ctypes.c_void_p(None)
    if kind == "p" and hasattr(value, "data_ptr"):
        if value.device.type != "cpu" or not value.is_contiguous():
            raise TypeError(f"{name}: a tensor that is not contiguous or not on the CPU")
        return ctypes.c_void_p(value.data_ptr())
    if kind == "p" and hasattr(value, "ctypes"):
        if not value.flags.c_contiguous:
            raise TypeError(f"{name}: an array that is not contiguous")
        return ctypes.c_void_p(value.ctypes.data)
    raise TypeError(f"{name}: {type(value).__name__} for a parameter of kind {kind!r}")
