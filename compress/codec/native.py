"""The C++ codec (``kernels/codec.cpp``) through ctypes, which releases the GIL for every call.

The library is looked for beside this file (a built wheel), then in the user's cache under a name
that digests its source, the flags and the processor; if it is in neither, it is compiled once, in a
few seconds.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.codec.format import TAIL
from compress.errors import Corrupt
from compress.paths import cache_dir, data_dir

if TYPE_CHECKING:
    import numpy as np

NAME = "native"
ABI = 2
LIBRARY = "libentropress.so"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=default")

_ERRORS = {
    -1: "truncated: the segments end before the tensor does",
    -2: "the sizes in a segment head contradict each other",
    -3: "a segment's table and directory have another checksum",
    -4: "a plane record or Huffman table is not valid",
    -5: "a bit stream does not end where its length says",
    -6: "the decoded bytes have another checksum",
    -7: "bytes follow the last segment",
    -8: "the output buffer is too small",
    -9: "the encoder could not decode its own output: memory or processor fault",
    -10: "out of memory",
    -11: "invalid argument",
}


def compiler() -> list[str] | None:
    """The C++ compiler's command: ``$CXX``, else the first of c++, g++, clang++ on the path."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def compile_library(command: Sequence[str], target: Path) -> None:
    """Compile ``kernels/codec.cpp`` to ``target``, atomically.

    Raises `subprocess.CalledProcessError` with the compiler's output, or `OSError`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        source = data_dir("kernels") / "codec.cpp"
        subprocess.run(
            [*command, *FLAGS, str(source), "-o", name], check=True, capture_output=True, text=True
        )
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def _cached_library(command: Sequence[str]) -> Path:
    kernels = data_dir("kernels")
    digest = hashlib.sha256(repr((command, FLAGS, platform.machine())).encode())
    for source in sorted((*kernels.glob("*.cpp"), *kernels.glob("*.h"), *kernels.glob("*.inc"))):
        digest.update(source.read_bytes())
    return cache_dir() / "native" / f"{digest.hexdigest()[:16]}.so"


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and the reason in one line."""
    packaged = Path(__file__).with_name(LIBRARY)
    try:
        if packaged.exists():
            path = packaged
        else:
            command = compiler()
            if command is None:
                return None, "no C++ compiler (c++, g++ or clang++) on the path"
            path = _cached_library(command)
            if not path.exists():
                compile_library(command, path)
        lib = ctypes.CDLL(str(path))
        if lib.ep_abi() != ABI:
            return None, f"{path.name} has ABI {lib.ep_abi()}, expected {ABI}"
    except subprocess.CalledProcessError as error:
        return None, f"the compiler failed: {error.stderr.strip().splitlines()[-1:]}"
    except (OSError, AttributeError) as error:
        return None, " ".join(str(error).split())
    u64, i64, void = ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p
    lib.ep_isa.restype = ctypes.c_char_p
    lib.ep_crc32c.restype, lib.ep_crc32c.argtypes = ctypes.c_uint32, [void, ctypes.c_size_t]
    lib.ep_encode_bound.restype, lib.ep_encode_bound.argtypes = i64, [u64, ctypes.c_int]
    integers = [ctypes.c_int] * 2
    lib.ep_encode.restype = lib.ep_predict.restype = lib.ep_decode.restype = i64
    lib.ep_encode.argtypes = [void, u64, *integers, void, u64, ctypes.c_int, void]
    lib.ep_predict.argtypes = [void, u64, *integers, ctypes.c_int, void]
    lib.ep_decode.argtypes = [void, u64, u64, *integers, ctypes.c_int, void, ctypes.c_int, void]
    matrix = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_int]  # rows, columns, layout
    lib.ep_packed_histogram.argtypes = [void, *matrix, void, ctypes.c_int]
    lib.ep_packed_measure.argtypes = [void, *matrix, void, void, void, ctypes.c_int]
    lib.ep_packed_write.argtypes = [void, *matrix, void, void, ctypes.c_int]
    lib.ep_packed_unpack.argtypes = [void, u64, *matrix, *matrix[:2], void, ctypes.c_int, void]
    lib.ep_packed_check.argtypes = [void, u64, *matrix, ctypes.c_int, void]
    for name in ("histogram", "measure", "write", "unpack", "check"):
        getattr(lib, f"ep_packed_{name}").restype = i64
    return lib, ""


def isa() -> str:
    """The instruction set chosen at run time: avx512, avx2, neon or portable."""
    return str(_library().ep_isa().decode())


def crc32c(data: Any) -> int:
    """CRC-32C of any contiguous buffer."""
    view = _view(data)
    return int(_library().ep_crc32c(view.ctypes.data, view.size))


def encode(data: np.ndarray, width: int, rotate: int, threads: int) -> memoryview:
    """The segments of ``data`` (uint8, whole words), decoded again and compared."""
    import numpy as np

    lib, words = _library(), data.size // width
    out = np.empty(lib.ep_encode_bound(words, width), dtype=np.uint8)
    size = _call(
        lib.ep_encode, data.ctypes.data, words, width, rotate, out.ctypes.data, out.size, threads
    )
    return memoryview(out)[:size]


def predict(data: np.ndarray, width: int, rotate: int, threads: int) -> int:
    """The number of bytes `encode` would return."""
    return _call(
        _library().ep_predict, data.ctypes.data, data.size // width, width, rotate, threads
    )


def decode(
    buffer: Any,
    nbytes: int,
    words: int,
    width: int,
    rotate: int,
    block_log2: int,
    out: np.ndarray,
    threads: int,
) -> None:
    """Decode ``nbytes`` of segments at the start of ``buffer`` into ``out`` (uint8, words * width).

    ``buffer`` holds at least `TAIL` bytes more, which bit readers may touch. Raises `Corrupt`.
    """
    view = _view(buffer)
    if view.size < nbytes + TAIL or out.size != words * width:
        raise ValueError("buffer without tail, or output of another size")
    _call(
        _library().ep_decode,
        view.ctypes.data,
        nbytes,
        words,
        width,
        rotate,
        block_log2,
        out.ctypes.data,
        threads,
    )


def _library() -> ctypes.CDLL:
    lib, reason = library()
    if lib is None:
        raise RuntimeError(reason)
    return lib


def _view(data: Any) -> np.ndarray:
    import numpy as np

    return data if isinstance(data, np.ndarray) else np.frombuffer(data, dtype=np.uint8)


def _call(function: Any, *arguments: Any) -> int:
    where = (ctypes.c_int64 * 2)()
    result = int(function(*arguments, where))
    if result >= 0:
        return result
    segment, block = where
    place = (f"segment {segment}" if segment >= 0 else "") + (
        f", block {block}" if block >= 0 else ""
    )
    if result == -10:
        raise MemoryError(_ERRORS[result])
    if result in (-8, -11):
        raise ValueError(_ERRORS[result])
    raise Corrupt(_ERRORS[result], where=place or None)
