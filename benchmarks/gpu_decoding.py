"""Decoding whole weights on a GPU, ours and others', for `gpu.py`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench, Row, TimeIsUp, trained
from gpu_dfloat11 import encode
from torch.nn import functional

from compress.codec import packed

_COPIED = 1 << 30


def copying(bench: Bench, nbytes: int = _COPIED) -> tuple[float, Row]:
    """GB/s of a copy within the device's memory, reads and writes counted; and the row."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    speed = 2 * nbytes / bench.milliseconds([lambda: target.copy_(source)]) / 1e6
    return speed, Row("copy", f"{nbytes >> 20} MiB", "bf16", speed, "GB/s", "read + written")


def decoding(bench: Bench, bandwidth: float, shape: tuple[int, int]) -> Iterator[Row]:
    """GB/s of bf16 written, and the share of what ``bandwidth`` allows: B / (1 + ratio)."""
    rows, cols = shape
    weight = trained(rows, cols, bench.device)
    case = f"{rows} x {cols}"
    for layout in packed.LAYOUTS:
        blob, planned = packed.cuda.pack(weight, layout)
        if not _same(packed.cuda.unpack(blob, planned), weight):
            yield Row("decode", case, layout, None, note="WRONG: the decoded weight differs")
            continue
        blobs = [blob, *(blob.clone() for _ in range(bench.turns(blob.numel()) - 1))]

        def unpack(blob: torch.Tensor, planned: packed.Layout = planned) -> torch.Tensor:
            return packed.cuda.unpack(blob, planned)

        ratio = planned.nbytes / weight.nbytes
        speed = weight.nbytes / bench.milliseconds(_each(unpack, blobs)) / 1e6
        note = f"{16 * ratio:.2f} bits, {speed * (1 + ratio) / bandwidth:.0%} of the limit"
        yield Row("decode", case, layout, speed, "GB/s", note)
    for name, other in (("DFloat11", dfloat11), ("nvCOMP ANS", nvcomp)):
        try:
            speed, note = other(bench, weight)
            yield Row("decode", case, name, speed, "GB/s", note)
        except TimeIsUp:
            yield Row("decode", case, name, None, note="the time was up")
        except Exception as error:  # others fail in ways of their own
            line = " ".join(str(error).split())[:200]
            yield Row("decode", case, name, None, note=line or type(error).__name__)


def dfloat11(bench: Bench, weight: torch.Tensor) -> tuple[float, str]:
    """The kernel of the package dfloat11, launched as its hook does, on our stream.

    The package itself is not imported: it needs cupy and an old setuptools.
    """
    found = importlib.util.find_spec("dfloat11")
    if found is None or found.origin is None:
        raise ImportError("dfloat11 is not installed")
    launcher: Any = packed.cuda.launcher(bench.device)
    launcher.load("decode", Path(found.origin).with_name("decode.ptx").read_bytes)
    unit = encode(weight.cpu())
    # The kernel may read a little past the end.
    parts = [functional.pad(part.flatten(), (0, 64)).to(bench.device) for part in unit.parts]

    def decode(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        out = torch.empty_like(weight)
        counts = (unit.luts, unit.code_bytes, weight.numel())
        launcher.launch("decode", unit.blocks, 512, [*parts, out, *counts], shared=unit.shared)
        return out

    if not _same(decode(parts), weight):
        raise RuntimeError("the decoded weight differs")
    nbytes = sum(part.nbytes for part in parts)
    copies = [parts, *([p.clone() for p in parts] for _ in range(bench.turns(nbytes) - 1))]
    speed = weight.nbytes / bench.milliseconds(_each(decode, copies)) / 1e6
    return speed, f"{8 * nbytes / weight.numel():.2f} bits"


def nvcomp(bench: Bench, weight: torch.Tensor) -> tuple[float, str]:
    """nvCOMP's ANS of the exponents alone: the merging with signs and mantissas costs it nothing.

    It waits for the device in each call, so it is not captured in a graph.
    """
    from nvidia import nvcomp as library

    exponents = (weight.view(torch.int16) >> 7).to(torch.uint8).flatten()
    stream = torch.cuda.current_stream().cuda_stream
    codec = library.Codec(algorithm="ANS", cuda_stream=stream)
    given = library.as_array(exponents, cuda_stream=stream)
    coded = codec.encode(given)
    back = torch.as_tensor(codec.decode(coded), device=bench.device)
    if not torch.equal(back.view(torch.uint8).flatten(), exponents):
        raise RuntimeError("the decoded exponents differ")
    nbytes = coded.buffer_size
    copies = [coded, *(codec.encode(given) for _ in range(bench.turns(nbytes) - 1))]
    time = bench.milliseconds(_each(codec.decode, copies), graph=False)
    bits = 8 + 8 * nbytes / weight.numel()
    return weight.nbytes / time / 1e6, f"{bits:.2f} bits, exponents alone"


def _each(
    function: Callable[[Any], object], inputs: Sequence[object]
) -> list[Callable[[], object]]:
    return [lambda given=given: function(given) for given in inputs]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
