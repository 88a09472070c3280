"""What the CUDA kernels take on each architecture: registers, shared memory, spills. No GPU needed.

One command, `python benchmarks/resources.py`, prints a table; it needs `nvcc` on the path.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")

_PROPERTIES = re.compile(
    r"Function properties for (\w+)\s+"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (\d+) registers(?:.*?, (\d+) bytes smem)?"
)


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers of a thread; bytes of shared memory of a block; bytes a thread
    keeps in local memory: spilled, and of arrays that are no registers."""

    registers: int
    shared: int
    spills: int
    stack: int


def measure(source: Path, arch: str) -> dict[str, Usage]:
    """Every kernel of a ``.cu`` file compiled by nvcc for ``arch``, e.g. ``"90"``.

    Raises `RuntimeError` with the compiler's words.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "cubin")
        flags = ["-cubin", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas", "-v", "-o", str(output)]
        command = ["nvcc", *flags, str(source)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ran.stdout + ran.stderr
    if ran.returncode:
        raise RuntimeError(said.strip())
    return {
        name: Usage(int(registers), int(shared or 0), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, registers, shared in _PROPERTIES.findall(said)
    }


def table(measured: dict[tuple[str, str], Usage], architectures: list[str]) -> list[str]:
    """Markdown: a row a kernel, a column an architecture; ``measured``: by these two."""
    lines = [
        f"| kernel | shared bytes | {' | '.join(f'sm_{arch}' for arch in architectures)} |",
        f"|---|---|{'---|' * len(architectures)}",
    ]
    for kernel in sorted({kernel for kernel, _ in measured}):
        usages = [measured[kernel, arch] for arch in architectures]
        shared = " / ".join(str(size) for size in sorted({usage.shared for usage in usages}))
        cells = [
            str(usage.registers) + (f" + {usage.spills} B spilled" if usage.spills else "")
            for usage in usages
        ]
        lines.append(f"| `{kernel}` | {shared} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("resources: no nvcc on the path; it comes with the CUDA toolkit")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release .*", version.stdout)
    jobs = list(product(sorted(KERNELS.glob("*.cu")), options.architectures))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: measure(*job), jobs))
    measured = {
        (kernel, arch): usage
        for (_, arch), kernels in zip(jobs, results, strict=True)
        for kernel, usage in kernels.items()
    }
    print(f"Registers of a thread, by nvcc {release[0] if release else ''}\n")
    print("\n".join(table(measured, options.architectures)))
    spilled = sorted({kernel for (kernel, _), usage in measured.items() if usage.spills})
    print(f"\nSpills: {', '.join(spilled) if spilled else 'none'}")


if __name__ == "__main__":
    main()
