"""Published tiny models, with whatever a test wants in their manifests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.checkpoint import read_manifest, write_manifest
from compress.report.canvas import Plot
from compress.report.facts import collect_facts
from compress.report.plots import draw_all

CONFIG = {"confidence": 0.95, "data": "builtin:heldout"}
NUMBERS = ("reference", "candidate", "value", "low", "high", "limit", "documents")


def row(name: str, verdict: str = "passed", **numbers: Any) -> dict[str, Any]:
    return {"name": name, "unit": "", "note": "", "verdict": verdict} | {
        key: numbers.get(key) for key in NUMBERS
    }


def gate(name: str, verdict: str, *rows: dict[str, Any], **others: Any) -> dict[str, Any]:
    result = {"gate": name, "config": CONFIG, "verdict": verdict, "summary": f"{name} {verdict}"}
    return result | {"reference": "tiny", "rows": list(rows), "details": {}} | others


PERPLEXITY = gate(
    "perplexity",
    "passed",
    row(
        "perplexity ratio",
        reference=19.17,
        candidate=24.1,
        value=1.257,
        low=1.21,
        high=1.298,
        limit=1.3,
        documents=27,
    ),
    details={"tokens": 20311},
)
LM_EVAL = gate(
    "lm_eval",
    "failed",
    row(
        "local_arc_easy acc",
        "failed",
        reference=0.56,
        candidate=0.49,
        value=0.07,
        low=0.04,
        high=0.1,
        limit=0.02,
        documents=570,
    ),
    row("local_tiny acc", "undecided", reference=0.5, candidate=0.5, value=0.0, limit=0.02),
    details={"local_arc_easy acc": {"lost": 61, "won": 22, "p_value": None, "method": "tango"}},
)


def table(scores: dict[str, list[float]], **others: Any) -> dict[str, Any]:
    """What `compress.signals.summarize` gives, as far as reports read it."""
    errors = {scorer: [0.1] * len(values) for scorer, values in scores.items()}
    empty: dict[str, Any] = {"protected": [], "sink_writers": []}
    return empty | {"scores": scores, "standard_errors": errors} | others


def pruning(config: dict[str, Any] | None = None, **metrics: Any) -> dict[str, Any]:
    """A `prune_blocks` stage of six blocks as manifests hold it, with members as given."""
    usual = {
        "granularity": "block",
        "blocks": 6,
        "removed": {"block": [3]},
        "signals": {"block": table({"cosine": [9.0, 5.0, 3.0, 1.0, 2.0, 8.0]})},
        "stability": None,
        "candidates": [{"rule": "cosine", "removed": {"block": [3]}, "kl": None}],
        "search": None,
        "budget": {"measure": "drops", "asked": 1, "reached": 1},
        "healing": None,
        "bytes_in": 1_000_000,
        "bytes_out": 900_000,
        "stale_patterns": [],
    }
    return {
        "stage": "prune_blocks",
        "config": {"scorer": "cosine", "search": "one_shot"} | (config or {}),
        "metrics": usual | metrics,
        "summary": "",
    }


JOINT = pruning(
    {"scorer": "knn_entropy", "search": "evolutionary", "granularity": "joint"},
    granularity="joint",
    removed={"attention": [2, 4], "mlp": [3]},
    signals={
        "attention": table({"knn_entropy": [9.0, 5, 1, 3, 2, 8]}, protected=[0, 5]),
        "mlp": table({"knn_entropy": [-9.0, 5, 1, 3, 0, 8]}, protected=[0, 5], sink_writers=[1]),
    },
    candidates=[
        {"rule": "knn_entropy", "removed": {"attention": [2], "mlp": [1, 4]}, "kl": 0.31},
        {"rule": "last_k", "removed": {"attention": [4], "mlp": [3, 4]}, "kl": None},
        {"rule": "cosine", "removed": {"attention": [3], "mlp": [2, 4]}, "kl": 0.21},
    ],
    search={
        "method": "evolutionary",
        "history": [0.3, 0.25, 0.19],
        "one_shot_kl": 0.22,
        "found_kl": 0.2,
        "kept": "found",
    },
    budget={"measure": "coded_bytes", "asked": 0.2, "reached": 0.2141},
    healing={
        "method": "distill",
        "kl_before": 0.2,
        "kl_after": 0.12,
        "kept": True,
        "history": [0.1, 0.4, 0.15],
    },
)


KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def layers(blocks: int = 6) -> dict[str, Any]:
    """What a `quantize` stage says of the layers of so many blocks."""
    return {
        f"model.layers.{block}.{kind}": {
            "bits_per_weight": 4.0 + 0.1 * place + 0.05 * block,
            "sqnr_db": 20.0 - block - place,
            "c": 0.2,
        }
        for block in range(blocks)
        for place, kind in enumerate(KINDS)
    }


def quantization(weights: dict[str, Any] | None = None, **metrics: Any) -> dict[str, Any]:
    """A `quantize` stage of six blocks as manifests hold it, with members as given."""
    usual = {
        "bits_per_weight": 4.25,
        "weights": 100_000,
        "code_bits": 421_000,
        "scale_bits": 4_000,
        "zero_point_bits": 0,
        "layers": layers(),
        "skipped": {"lm_head": "tied to the embeddings"},
        "bytes_in": 1_000_000,
        "bytes_out": 600_000,
    }
    method = {"method": "ecsq", "bits_per_weight": 4.3, "bits": None, "group": None}
    return {
        "stage": "quantize",
        "config": {"weights": method | (weights or {}), "activations": None},
        "metrics": usual | metrics,
        "summary": "",
    }


SEARCHED = quantization(
    {"bits_per_weight": None, "max_perplexity_ratio": 1.1},
    format="compressed-tensors",
    perplexity_search={
        "max_ratio": 1.1,
        "ratio": 1.093,
        "trials": [
            {"bits_per_weight": 6.0, "ratio": 1.004},
            {"bits_per_weight": 3.0, "ratio": 1.9},
            {"bits_per_weight": 4.25, "ratio": 1.093},
            {"bits_per_weight": 2.0, "ratio": None},
        ],
    },
    fold={"alpha": 0.5, "layers": 12, "skipped": {"model.layers.5.mlp.down_proj": "did not run"}},
    search={
        "start_loss": 0.31,
        "loss": 0.22,
        "history": [0.31, 0.27, 0.22],
        "dropped": [["attention", 3]],
        "units": {
            "attention": [0.25, 0.0, -0.25, None, 0.0, 0.5],
            "mlp": [0.0, 0.25, 0.0, -0.5, 0.0, 0.0],
        },
    },
    training={
        "mode": "blockwise",
        "windows": [[0, 2], [2, 4], [4, 6]],
        "partition": "entropy",
        "entropies": [3.0, 2.0, 3.5, 2.5, 3.1, 4.0],
        "history": [0.5, 0.3, 0.2, 0.9, 0.5, 0.4, 1.5, 1.2, 1.0],
        "errors": [0.1, 0.2, 0.4],
        "oscillation": 0.034,
        "paper_literal": True,
    },
)


def token_pruning(config: dict[str, Any] | None = None, **metrics: Any) -> dict[str, Any]:
    """A `prune_tokens` stage of eight layers as manifests hold it, with members as given."""
    policy = {"layer": 3, "keep": 0.25, "selector": "logdet", "target": "visual"}
    usual = {
        "policy": policy | {"seed": 0, "sinks": 4, "recent": 32, "options": {}},
        "collapse_layer": 3,
        "entropies": [0.71, 0.69, 0.68, 0.41, 0.4, 0.39, 0.42, 0.4],
        "losses": {"random": 0.31, "logdet": 0.12, "divprune": 0.14, "fastv": 0.52},
        "less_than_random": {"estimate": 0.18, "low": 0.11, "high": 0.26},
        "inputs": 64,
        "tokens": 256.0,
        "flops_share": 0.4123,
        "bytes_in": 1_000_000,
        "bytes_out": 1_000_000,
    }
    return {
        "stage": "prune_tokens",
        "config": {"layer": "auto", "selector": "auto", "insist": False} | (config or {}),
        "metrics": usual | metrics,
        "summary": "",
    }


@pytest.fixture(scope="session")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of six blocks removed, then coded. Read-only."""
    output = tmp_path_factory.mktemp("published") / "pruned"
    overrides = ("calibration.sequences=2", "calibration.length=64", "stages.prune_blocks.drop=2")
    pipeline.run("entropy_prune.yaml", tiny_llama, output, overrides=overrides)
    return output


@pytest.fixture
def publish(pruned: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `pruned` whose manifest has other members, as given."""

    def make(name: str = "model", **members: Any) -> Path:
        directory = tmp_path / name
        shutil.copytree(pruned, directory)
        write_manifest(directory, read_manifest(directory) | members)
        return directory

    return make


@pytest.fixture(scope="session")
def plots(pruned: Path) -> dict[str, Plot]:
    return draw_all(collect_facts(pruned))


@pytest.fixture
def drawn_before(plots: dict[str, Plot], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second: reports show the plots of `pruned`, whatever they are of."""
    monkeypatch.setattr("compress.report.write.draw_all", lambda facts: plots)
