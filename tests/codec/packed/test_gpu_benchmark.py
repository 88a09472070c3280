"""`benchmarks/gpu.py` on the emulator: everything but the numbers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.codec import packed
from compress.codec.df11 import Unit, decode_unit
from compress.codec.packed import cuda
from tests.codec.packed.emulated import shared_emulator

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
CPU = torch.device("cpu")
MODEL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def script() -> Any:
    """Loads a file of the benchmark."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def gpu(script: Any) -> ModuleType:
    return script("gpu")


def small(gpu: ModuleType) -> Any:
    return gpu.Sizes(1 << 12, (33, 130), MODEL, {"tiny": {"o": (33, 40), "down": (8, 130)}}, (1, 2))


def bench(gpu: ModuleType) -> Any:
    return gpu.Bench(CPU, seconds=0.0)


def test_every_part_gives_its_rows(gpu: ModuleType, tmp_path_factory: Any) -> None:
    with cuda.register_launcher("cpu", shared_emulator(tmp_path_factory)):
        rows = list(gpu.run(bench(gpu), 600, small(gpu)))
    measured = {(row.part, row.method) for row in rows if row.value}
    ours = {"bf16", "fast", "dense"}
    products = {("product", method) for method in ours}
    decoded = {("decode", "fast"), ("decode", "dense")}
    models = {(what, method) for what in ("model, eager", "model, weights") for method in ours}
    assert measured == {("copy", "bf16")} | decoded | products | models
    assert all(row.value > 0 for row in rows if row.value is not None)
    assert not any("WRONG" in row.note for row in rows)
    cases = [row.case for row in rows if row.part == "product" and row.method == "fast"]
    shapes = [f"tiny {n}, batch {b}" for n in ("o 33 x 40", "down 8 x 130") for b in (1, 2)]
    assert cases == [*shapes, "tiny, a layer, batch 1", "tiny, a layer, batch 2"]
    others = {row.method: row for row in rows if row.method not in ours}
    assert set(others) == {"DFloat11", "nvCOMP ANS"}
    assert all(row.value is None and row.note for row in others.values())
    lines = gpu.table(rows).splitlines()
    assert all(line.count("|") == 7 for line in lines)
    assert len(lines) == 2 + len({(row.part, row.case) for row in rows})


def test_wrong_bits_are_told(
    gpu: ModuleType, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cuda.register_launcher("cpu", shared_emulator(tmp_path_factory)):
        unpack, linear = cuda.unpack, cuda.linear
        packs = cuda.pack
        monkeypatch.setattr(cuda, "unpack", lambda *a: -unpack(*a))
        monkeypatch.setattr(cuda, "linear", lambda *a: linear(*a) + 9)

        def pack(*args: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(cuda, "unpack", unpack)
                return packs(*args)

        monkeypatch.setattr(cuda, "pack", pack)
        rows = list(gpu.run(bench(gpu), 600, small(gpu), ("decode", "product")))
    ours = [row for row in rows if row.method in ("fast", "dense")]
    assert len(ours) == 2 + 2 * 4
    assert all(row.value is None and row.note.startswith("WRONG") for row in ours)


def test_a_layer_is_no_sum_of_what_was_wrong(
    gpu: ModuleType, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = cuda.linear

    def sometimes_wrong(x: torch.Tensor, blob: torch.Tensor, of: packed.Layout) -> torch.Tensor:
        return linear(x, blob, of) + 9 * (of.layout == "fast" and of.rows == 33)

    monkeypatch.setattr(cuda, "linear", sometimes_wrong)
    with cuda.register_launcher("cpu", shared_emulator(tmp_path_factory)):
        rows = list(gpu.run(bench(gpu), 600, small(gpu), ("product",)))
    sums = [row.method for row in rows if "a layer" in row.case]
    assert sums == ["bf16", "dense"] * 2


def test_a_part_that_fails_costs_no_other(
    gpu: ModuleType, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("an illegal\nmemory access")

    monkeypatch.setattr(gpu, "models", lost)
    with cuda.register_launcher("cpu", shared_emulator(tmp_path_factory)):
        rows = list(gpu.run(bench(gpu), 600, small(gpu), ("copy", "model", "product")))
    failed = [row for row in rows if row.value is None]
    assert [row.part for row in failed] == ["model"]
    assert failed[0].note == "FAILED: RuntimeError: an illegal memory access"
    assert {row.part for row in rows} == {"copy", "model", "product"}


def test_rounds_on_a_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of calls whose results do not share memory; replayed behind another replay."""
    did: list[str] = []
    told = SimpleNamespace(
        replay=lambda: did.append("replay"),
        record=lambda: did.append("record"),
        synchronize=lambda: did.append("wait"),
        elapsed_time=lambda other: 40.0,
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: told)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: told)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    places: list[int] = []

    def call() -> torch.Tensor:
        made = torch.empty(1000)
        places.append(made.data_ptr())
        return made

    timer = gpu.Bench(torch.device("cuda", 0), seconds=0.0)
    assert timer.milliseconds([call, call]) == 2.0
    assert len(set(places[2:])) == len(places[2:]) == 20
    assert did == ["replay", "record", "replay", "record", "wait"] * 5


def test_a_part_whose_time_is_up_says_so(gpu: ModuleType) -> None:
    rows = list(gpu.run(bench(gpu), -1, small(gpu), ("copy", "model", "product")))
    assert {row.part for row in rows} == {"copy", "model, eager", "product"}
    assert all(row.note == "the time was up" for row in rows)
    assert "not measured: the time was up" in gpu.table(rows)


def test_inputs_take_turns_until_the_cache_is_full(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = gpu.Bench(torch.device("cuda", 0))
    monkeypatch.setattr(type(cached), "l2", 50 << 20)
    assert cached.turns(1 << 30) == 2
    assert cached.turns(16 << 20) == 10
    called: list[int] = []
    calls = [lambda: called.append(0), lambda: called.append(1)]
    assert bench(gpu).milliseconds(calls) >= 0
    assert called == [0, 1] * (len(called) // 2)
    assert len(called) > 4


@pytest.mark.parametrize("spread", [0, 60])
def test_dfloat11_s_format_is_what_its_readers_expect(spread: int, script: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20_000, generator=generator) * 0.02
    weight *= 2.0 ** (torch.randn(20_000, generator=generator) * spread).clamp(-90, 90).round()
    words = weight.bfloat16()
    unit = script("gpu_dfloat11").encode(words)
    luts, codes, signs, positions, gaps = (part.numpy() for part in unit.parts)
    assert unit.luts == len(luts) > (3 if spread else 2)
    assert unit.blocks == -(-codes.size // 4096)
    parts = Unit(luts, codes, signs, positions.view(np.uint32), gaps)
    assert np.array_equal(decode_unit(parts, "unit"), words.view(torch.int16).numpy().view("<u2"))


class TheirKernel:
    """What DFloat11's does with its arguments, in Python."""

    def load(self, source: str, image: Callable[[], bytes]) -> None:
        assert (source, image()) == ("decode", b"ptx")

    def launch(self, name: str, grid: int, block: int, args: Sequence[Any], *, shared: int) -> None:
        *parts, out, rows, code_bytes, words = args
        luts, codes, signs, positions, gaps = (part.numpy().ravel() for part in parts)
        starts = positions[: 4 * (grid + 1)].view(np.uint32)
        assert (name, block) == ("decode", 512)
        assert shared == 4 * 512 + 4 + 2 * np.diff(starts.astype(int)).max()
        assert out.numel() == words
        sizes = luts[: 256 * rows].reshape(rows, 256), codes[:code_bytes], signs[:words]
        unit = Unit(*sizes, starts, gaps[: grid * 512 * 5 // 8])
        decoded = decode_unit(unit, "unit").astype(np.uint16).view(np.int16)
        out.view(torch.int16).view(-1).copy_(torch.from_numpy(decoded))


def test_dfloat11_s_kernel_gets_what_it_expects(
    script: Any, gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dfloat11").mkdir()
    (tmp_path / "dfloat11" / "__init__.py").write_text("raise ImportError('needs a GPU')")
    (tmp_path / "dfloat11" / "decode.ptx").write_bytes(b"ptx")
    monkeypatch.syspath_prepend(tmp_path)
    weight = script("gpu_bench").trained(64, 300, CPU)
    kernel: Any = TheirKernel()
    with cuda.register_launcher("cpu", kernel):
        speed, note = script("gpu_decoding").dfloat11(bench(gpu), weight)
    assert speed > 0
    assert 10 < float(note.split()[0]) < 12.5


def test_trained_weights_have_exponents_like_trained_ones(script: Any) -> None:
    weight = script("gpu_bench").trained(512, 512, CPU)
    exponents = (weight.view(torch.int16) >> 7 & 255).flatten()
    shares = exponents.bincount().double() / exponents.numel()
    bits = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
    assert 2.5 < bits < 2.8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line_and_3(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


def test_an_unknown_part_is_refused(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "copy,decoding"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert "no such part: decoding; there are copy, decode" in capsys.readouterr().err
