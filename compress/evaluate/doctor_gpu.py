"""What `doctor --gpu` adds: the device, the compiler of its kernels, and whether they are exact."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

from compress.codec import packed
from compress.errors import EntropressError
from compress.evaluate.doctor import Finding
from compress.paths import cache_dir
from compress.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

_COPIED = 1 << 28  # bytes: more than any L2 holds
_COPIES = 20


def diagnose_gpu(progress: Progress = SILENT) -> Iterator[Finding]:
    """Findings about the first CUDA device; ends with the first that makes others impossible."""
    import torch

    device = torch.device("cuda", 0)
    try:
        packed.cuda.launcher(device)
    except EntropressError as error:
        yield Finding("gpu", False, str(error))
        return
    gpu = torch.cuda.get_device_properties(device)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
    versions = f"sm_{gpu.major}{gpu.minor}, driver {driver_version()}, CUDA {torch.version.cuda}"
    yield Finding("gpu", True, f"{gpu.name}, {memory}, {versions}")
    try:
        yield Finding("nvrtc", True, packed.compiler().name)
        bandwidth = copy_bandwidth(device)
        copied = f"{bandwidth:.0f} GB/s read and written at once"
        if clock := getattr(gpu, "clock_rate", 0) / 1e3:  # which old releases of torch do not tell
            layout = packed.choose(bandwidth, clock, gpu.multi_processor_count)
            copied += f", {clock:.0f} MHz: layout {layout}"
        yield Finding("bandwidth", True, copied)
        found = packed.self_test(device, progress=progress)
    except (EntropressError, RuntimeError) as error:  # the latter from the driver
        yield Finding("kernels", False, str(error))
        return
    cubins = list((cache_dir() / "cuda").glob("*.cubin"))
    yield Finding("cubins", True, f"{len(cubins)} in {cache_dir() / 'cuda'}")
    wrong = f"{len(found.faults)} of {found.comparisons} wrong, the first: {found.faults[:1]}"
    good = f"{found.comparisons} comparisons with the CPU, all equal to the bit"
    yield Finding("kernels", not found.faults, wrong if found.faults else good)


def driver_version() -> str:
    """Of NVIDIA's driver, as it calls itself."""
    if (command := shutil.which("nvidia-smi")) is None:
        return "unknown"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["unknown"])[0]


def copy_bandwidth(device: torch.device) -> float:
    """GB/s that copying within the device's memory moves, reads and writes counted."""
    import torch

    source = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(_COPIES):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * _COPIED * _COPIES / start.elapsed_time(end) / 1e6
