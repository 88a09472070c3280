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
