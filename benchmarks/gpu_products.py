"""Products of one to eight rows with packed weights, against cuBLAS, for `gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from gpu_bench import Bench, Row, TimeIsUp, trained
from torch.nn import functional

from compress.codec import packed

# (rows, columns) of what a layer multiplies with, where inputs are shared merged.
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate, up": (28672, 4096),
        "down": (4096, 14336),
    },
    "Qwen-32B": {
        "qkv": (10240, 5120),
        "o": (5120, 8192),
        "gate, up": (51200, 5120),
        "down": (5120, 25600),
    },
    "Llama-70B": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate, up": (57344, 8192),
        "down": (8192, 28672),
    },
}
BATCHES = (1, 2, 4, 8)
_ROUNDING = 2**-6  # of the largest result: two ways of summing bf16 products differ by less


def products(
    bench: Bench,
    layers: dict[str, dict[str, tuple[int, int]]] = LAYERS,
    batches: Sequence[int] = BATCHES,
) -> Iterator[Row]:
    """Microseconds of a product, replayed from CUDA graphs, and how many times cuBLAS's speed.

    For each model then the sum over a layer, at each batch, where all of it was measured.
    """
    for model, shapes in layers.items():
        times: dict[tuple[int, str], list[float]] = {}
        for name, shape in shapes.items():
            try:
                for batch, row in _shape(bench, f"{model} {name}", shape, batches):
                    yield row
                    if row.value is not None:
                        times.setdefault((batch, row.method), []).append(row.value)
            except TimeIsUp:
                yield Row("product", f"{model} {name}", "bf16", None, note="the time was up")
                return
        sums = {key: sum(found) for key, found in times.items() if len(found) == len(shapes)}
        for (batch, method), time in sums.items():
            yield _row(f"{model}, a layer", batch, method, time, sums[batch, "bf16"])


def _shape(
    bench: Bench, case: str, shape: tuple[int, int], batches: Sequence[int]
) -> Iterator[tuple[int, Row]]:
    bench.check()
    weight = trained(*shape, bench.device)
    blobs = {layout: packed.cuda.pack(weight, layout) for layout in packed.LAYOUTS}
    weights = [weight, *(weight.clone() for _ in range(bench.turns(weight.nbytes) - 1))]
    copies = {
        layout: [blob, *(blob.clone() for _ in range(bench.turns(blob.numel()) - 1))]
        for layout, (blob, _) in blobs.items()
    }
    case = f"{case} {shape[0]} x {shape[1]}"
    for batch in batches:
        x = trained(batch, shape[1], bench.device, seed=batch) * 50
        dense = functional.linear(x, weight)
        calls = [partial(functional.linear, x, w) for w in weights]
        base = bench.milliseconds(calls) * 1e3
        yield batch, _row(case, batch, "bf16", base, base)
        for layout, (blob, planned) in blobs.items():
            off = (packed.cuda.linear(x, blob, planned) - dense).abs().max()
            if not off <= _ROUNDING * dense.abs().max():
                wrong = f"WRONG: off by {off:.3g}"
                yield batch, Row("product", f"{case}, batch {batch}", layout, None, note=wrong)
                continue
            calls = [partial(packed.cuda.linear, x, copy, planned) for copy in copies[layout]]
            time = bench.milliseconds(calls) * 1e3
            yield batch, _row(case, batch, layout, time, base)


def _row(case: str, batch: int, method: str, time: float, base: float) -> Row:
    note = "" if method == "bf16" else f"{base / time:.2f}×"
    return Row("product", f"{case}, batch {batch}", method, time, "µs", note)
