"""Kernels on a CUDA device: loaded from cubins and launched by the driver's public C interface.

Nothing here waits for the device or takes its memory, so launches can be captured in CUDA graphs
once each kernel has run before.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compress.codec.packed import nvrtc
from compress.errors import BadInput, Missing

if TYPE_CHECKING:
    import torch

_SOURCES = {"unpack": "unpack.cu", "rows": "unpack.cu", "linear": "linear.cu", "pack": "pack.cu"}
_OLDEST = (7, 5)


class CudaLauncher:
    """`launch` runs kernels of ``kernels/*.cu`` on one device, on torch's current stream.

    They are compiled (or found in the cache) and loaded when first wanted. The first word of a
    kernel's name tells its source; of products those of one layout and dtype come together.
    """

    def __init__(self, index: int) -> None:
        import torch

        self.arch = architecture(index)
        self._index = index
        self._driver = _driver()
        self._context = ctypes.c_void_p()
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._modules: dict[str, ctypes.c_void_p] = {}
        with torch.cuda.device(index):
            torch.cuda.init()
            device = ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(device), index)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def launch(
        self,
        name: str,
        grid: int,
        block: int,
        args: Sequence[torch.Tensor | int | None],
        *,
        shared: int = 0,
    ) -> None:
        """Run kernel ``name`` in ``grid`` blocks of ``block`` threads.

        ``args``: tensors of this device are passed as pointers, numbers in 32 bits, None as a null
        pointer. ``shared``: bytes of dynamic shared memory.
        """
        import torch

        values = [_argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        with torch.cuda.device(self._index):
            # torch may not have bound the device's context to this thread yet.
            self._call("cuCtxSetCurrent", self._context)
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            kernel = self._kernels.get(name) or self._find(name)
            self._call(
                "cuLaunchKernel", kernel, grid, 1, 1, block, 1, 1, shared, stream, pointers, None
            )

    def prepare(self, name: str) -> None:
        """Compile and load kernel ``name`` if it is not yet, as a captured graph could not."""
        if name not in self._kernels:
            import torch

            with torch.cuda.device(self._index):
                self._call("cuCtxSetCurrent", self._context)
                self._find(name)

    def load(self, source: str, image: Callable[[], bytes]) -> None:
        """Make the kernels of a cubin or PTX text known, unless ``source`` was loaded before."""
        if source not in self._modules:
            import torch

            module = ctypes.c_void_p()
            with torch.cuda.device(self._index):
                self._call("cuCtxSetCurrent", self._context)
                self._call("cuModuleLoadData", ctypes.byref(module), image())
            self._modules[source] = module

    def _find(self, name: str) -> ctypes.c_void_p:
        kind, *words = name.split("_")
        source = _SOURCES.get(kind, name)
        macros = (
            dict(zip(("EP_LAYOUT", "EP_DTYPE"), words, strict=False)) if kind == "linear" else {}
        )
        module = " ".join((source, *macros.values()))
        self.load(module, lambda: nvrtc.cubin(source, self.arch, macros))
        kernel = ctypes.c_void_p()
        self._call(
            "cuModuleGetFunction", ctypes.byref(kernel), self._modules[module], name.encode()
        )
        self._kernels[name] = kernel
        return kernel

    def _call(self, function: str, *args: object) -> None:
        if status := getattr(self._driver, function)(*args):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown").decode()
            raise RuntimeError(f"{function} on cuda:{self._index}: error {status}, {said}")


def architecture(index: int) -> str:
    """What NVRTC calls the device, e.g. ``"90"``.

    Raises `Missing` without a CUDA device, `BadInput` for one older than Turing.
    """
    import torch

    cpu = "models load on the CPU as before"
    if not torch.version.cuda:
        raise Missing(
            "this torch is built without CUDA",
            got=torch.__version__,
            mend=f"install another; {cpu}",
        )
    if not torch.cuda.is_available():
        raise Missing("torch sees no CUDA device", mend=f"look at `nvidia-smi`; {cpu}")
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < _OLDEST:
        raise BadInput(
            "the GPU is too old for packed weights",
            where=f"cuda:{index}, {torch.cuda.get_device_name(index)}",
            got=f"compute capability {major}.{minor}",
            expected="7.5 or newer",
            mend=cpu,
        )
    return f"{major}{minor}"


@functools.cache
def cuda_launcher(index: int) -> CudaLauncher:
    """The launcher of device ``index``. Raises as `architecture`."""
    return CudaLauncher(index)


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Missing("no NVIDIA driver", got=error, mend="install it") from error


def _argument(arg: torch.Tensor | int | None) -> ctypes.c_void_p | ctypes.c_uint32:
    if isinstance(arg, int):
        return ctypes.c_uint32(arg)
    return ctypes.c_void_p(None if arg is None else arg.data_ptr())
