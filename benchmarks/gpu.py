"""Packed weights on a GPU: decoding, products and a whole model, against bf16 and other coders.

    python benchmarks/gpu.py [--json FILE] [--minutes 8] [--only copy,decode,product,model]

One markdown table. Inputs take turns so that none is found in the L2 cache; times are medians of
CUDA events around replays of CUDA graphs, but for "eager" and nvCOMP. What is decoded is compared
as integers first; the exit code is 1 if anything differs or fails, and 3 where there is no GPU.
Rows are told on stderr as they come. DFloat11's kernel is measured where the package ``dfloat11``
is installed, nvCOMP where ``nvidia-nvcomp-cu12`` or ``-cu13`` is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, Row, TimeIsUp, table
from gpu_decoding import copying, decoding
from gpu_model import LLAMA_8B, models, release
from gpu_products import BATCHES, LAYERS, products

from compress import __version__
from compress.codec import packed
from compress.errors import EntropressError
from compress.evaluate import driver_version

# Of the whole time, what each part may take; what one leaves over the next ones get.
SHARES = {"copy": 0.05, "decode": 0.2, "model": 0.4, "product": 0.35}


@dataclass(frozen=True)
class Sizes:
    """What is measured; by default as the results are given, in tests less."""

    copied: int = 1 << 30
    decoded: tuple[int, int] = (8192, 4096)
    model: dict[str, Any] = field(default_factory=lambda: dict(LLAMA_8B))
    layers: dict[str, dict[str, tuple[int, int]]] = field(default_factory=lambda: dict(LAYERS))
    batches: tuple[int, ...] = BATCHES


def run(
    bench: Bench, seconds: float, sizes: Sizes, parts: Collection[str] = tuple(SHARES)
) -> Iterator[Row]:
    """The rows of all ``parts``, which together take little more than ``seconds``."""
    end = time.monotonic() + seconds
    bandwidth = 0.0
    left = sum(SHARES[part] for part in parts)
    for part, share in SHARES.items():
        if part not in parts:
            continue
        bench.give((end - time.monotonic()) * share / left)
        left -= share
        try:
            release()
            if part == "copy":
                bandwidth, row = copying(bench, sizes.copied)
                yield row
            elif part == "decode":
                bandwidth = bandwidth or copying(bench, sizes.copied)[0]
                yield from decoding(bench, bandwidth, sizes.decoded)
            elif part == "product":
                yield from products(bench, sizes.layers, sizes.batches)
            else:
                yield from models(bench, sizes.model)
        except TimeIsUp:
            yield Row(part, "", "bf16", None, note="the time was up")
        except Exception as error:  # what has been measured is not to be lost
            line = " ".join(f"FAILED: {type(error).__name__}: {error}".split())[:200]
            yield Row(part, "", "bf16", None, note=line)


def heading(device: torch.device) -> dict[str, str]:
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": gpu.name,
        "driver": driver_version(),
        "date": datetime.date.today().isoformat(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "compiler": packed.compiler().name,
        "entropress": __version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", default=",".join(SHARES), help="parts, by commas")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(SHARES):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(SHARES)}")
    device = torch.device("cuda", 0)
    try:
        packed.cuda.launcher(device)
        told = heading(device)
    except EntropressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(", ".join(f"{name} {value}" for name, value in told.items()) + "\n")
    rows = []
    for row in run(Bench(device), 60 * options.minutes, Sizes(), parts):
        print(f"{row.part}, {row.case}, {row.method}: {row}", file=sys.stderr, flush=True)
        rows.append(row)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({**told, "rows": list(map(asdict, rows))}, indent=1))
    sys.exit(int(any(row.note.startswith(("WRONG", "FAILED")) for row in rows)))


if __name__ == "__main__":
    main()
