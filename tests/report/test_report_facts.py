from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress import checkpoint as room
from compress import codec
from compress.checkpoint import read_manifest, write_manifest
from compress.codec.format import BLOCK_LOG2
from compress.codec.segment import parse_head, parse_segment
from compress.errors import BadInput
from compress.report.exponents import measure_exponents, pool
from compress.report.facts import collect_facts
from compress.report.gates import read_gates
from compress.signals import measure_weights
from tests.report.conftest import LM_EVAL, PERPLEXITY, gate, row

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn]


def save(directory: Path, **tensors: torch.Tensor) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def normal(dtype: torch.dtype, count: int = 30_000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.1).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e5m2], ids=str)
def test_entropies_are_those_that_inspect_finds(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = room.open(save(tmp_path / "m", a=normal(dtype), ids=torch.arange(9)))
    [found] = measure_exponents(checkpoint)
    [expected] = [tensor for tensor in measure_weights(checkpoint) if tensor.symbol == "exponent"]
    assert (found.name, found.weights) == (expected.name, expected.weights)
    assert found.bits == pytest.approx(expected.bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_code_lengths_are_those_in_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = room.open(save(tmp_path / "m", a=normal(dtype)))
    info = checkpoint.tensor_infos()["a"]
    coded = b"".join(codec.encode("a", info.dtype, info.shape, checkpoint.chunks("a")))
    header = codec.read_header(coded)
    head = parse_head(coded[header.size :], header.words, header.width, BLOCK_LOG2)
    segment = parse_segment(coded[header.size :], head, header.width, BLOCK_LOG2, None)
    histogram = pool(measure_exponents(checkpoint))
    assert histogram is not None
    assert tuple(histogram.lengths) == segment.planes[-1].lengths
    assert histogram.entropy <= histogram.mean_length < histogram.entropy + 1
    assert sum(histogram.counts) == 30_000


@pytest.mark.parametrize("size", [1, 3, 7, 4096])
def test_a_chunk_may_end_inside_a_word(tmp_path: Path, size: int) -> None:
    whole = room.open(save(tmp_path / "m", a=normal(torch.float32, 500)))

    def chunks(name: str) -> Iterator[bytes]:
        data = b"".join(bytes(chunk) for chunk in whole.chunks(name))
        return (data[i : i + size] for i in range(0, len(data), size))

    cut: Any = SimpleNamespace(tensor_infos=whole.tensor_infos, chunks=chunks)
    [expected], [found] = measure_exponents(whole), measure_exponents(cut)
    assert found.bits == expected.bits
    assert found.coded.tolist() == expected.coded.tolist()


def test_the_histogram_is_of_the_dtype_with_most_weights(tmp_path: Path) -> None:
    tensors = {"a": normal(torch.float32, 50), "b": normal(torch.bfloat16, 90)}
    histogram = pool(measure_exponents(room.open(save(tmp_path / "m", **tensors))))
    assert histogram is not None
    assert (histogram.dtype, sum(histogram.counts)) == ("BF16", 90)
    assert pool([]) is None
    constant = room.open(save(tmp_path / "n", a=torch.ones(9), b=torch.zeros(0)))
    assert pool(measure_exponents(constant)) is None


def test_what_a_pruned_model_is(pruned: Path, tiny_llama: Path) -> None:
    facts = collect_facts(pruned)
    assert (facts.name, facts.source, facts.revision) == ("pruned", "tiny", None)
    assert not facts.lossless
    assert facts.coded
    before = room.open(tiny_llama).tensor_infos().values()
    assert facts.bytes_before == sum(info.nbytes for info in before)
    assert facts.total.stored_nbytes < facts.bytes_before
    assert sum(kind.stored_nbytes for kind in facts.kinds) == facts.total.stored_nbytes
    assert [stage.name for stage in facts.stages] == ["prune_blocks", "encode_weights"]
    [pruning] = facts.prunings
    assert pruning.blocks == [0, 1, 2, 3, 4, 5]
    [scores] = pruning.scores
    assert (scores.kind, scores.scorer) == ("block", "knn_entropy")
    assert scores.protected == [0, 1, 5]
    gone = facts.removed["block"]
    assert facts.removed == pruning.removed == {"block": scores.gone}
    assert len(gone) == 2
    assert set(gone) < {2, 3, 4}
    assert "knn_entropy" in [candidate.rule for candidate in pruning.candidates]
    # The blocks that are left bear the numbers that they had.
    assert [layer.block for layer in facts.layers] == sorted({*range(6)} - {*gone})
    assert all(kind.exponent_bits for kind in facts.kinds if kind.nbytes > 1000)


def test_gates_come_worst_first_and_are_no_better_than_their_rows() -> None:
    lying = gate("divergence", "passed", row("kl", "undecided", value=0.3))
    strange = gate("new", "splendid")
    gates = read_gates([PERPLEXITY, lying, strange, LM_EVAL, "no gate", gate("late", "pending")])
    assert [(g.name, g.verdict) for g in gates] == [
        ("lm_eval", "failed"),
        ("divergence", "undecided"),
        ("new", "undecided"),
        ("late", "pending"),
        ("perplexity", "passed"),
    ]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "not gated"),
        (["passed"], "passed"),
        (["passed", "failed", "undecided"], "failed"),
        (["passed", "undecided"], "undecided"),
        (["passed", "pending"], "pending"),
    ],
)
def test_the_overall_verdict_is_the_worst(
    publish: Callable[..., Path], verdicts: list[str], expected: str
) -> None:
    gates = [gate("perplexity", verdict) for verdict in verdicts]
    assert collect_facts(publish(gates=gates)).verdict == expected


def test_values_of_a_wrong_kind_are_left_out() -> None:
    odd = row("x") | {"value": "high", "low": True, "limit": [1], "documents": -3, "high": 10**400}
    broken = {"gate": None, "config": 3, "rows": [odd, 5], "details": {"a": [1, None, 2], "b": {}}}
    [found] = read_gates([broken])
    [read] = found.rows
    assert (found.name, found.verdict, found.config) == ("unnamed", "undecided", {})
    assert (read.value, read.low, read.high, read.limit, read.documents) == (None,) * 5
    assert found.details == [("a", "1 [−∞, 2]")]


def test_without_a_manifest_there_is_nothing_to_report(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no entropress.json"):
        collect_facts(tiny_llama)
    with pytest.raises(BadInput, match="no such directory"):
        collect_facts(tmp_path / "nowhere")


def test_a_model_without_blocks_or_floats(publish: Callable[..., Path]) -> None:
    directory = publish(stages=[], tensors={})
    manifest = read_manifest(directory)
    model = save(directory.with_name("ints"), codes=torch.arange(40), mask=torch.ones(8) > 0)
    write_manifest(model, manifest)
    facts = collect_facts(model)
    assert (facts.layers, facts.prunings, facts.histogram) == ([], [], None)
    assert facts.bytes_before is None
    assert facts.total.exponent_bits is None
