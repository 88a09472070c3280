"""A model, its lossless output and a pruned one; a text and a task short enough for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress import pipeline
from compress import recipe as recipes

TEXT = "the entropy of a source is the number of bits that each of its symbols needs"


@pytest.fixture(scope="session")
def lossless(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(
        "lossless.yaml", tiny_llama, tmp_path_factory.mktemp("outputs") / "lossless"
    ).path


@pytest.fixture(scope="session")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipes.parse(
        {
            "version": 1,
            "calibration": {"sequences": 2, "length": 64},
            "stages": [{"prune_blocks": {"drop": 2}}, "encode_weights"],
        }
    )
    return pipeline.run(recipe, tiny_llama, tmp_path_factory.mktemp("outputs") / "pruned").path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "heldout.jsonl"
    words = TEXT.split()
    documents = [" ".join(words[i % 7 :] + words[: i % 5]) for i in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


TASK = """
task: tiny_choice
custom_dataset: !function tiny_data.load
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
LOADER = """
from datasets import Dataset, DatasetDict

def load(**_):
    docs = [{"question": f"Is {i} even? ", "answer": i % 2} for i in range(24)]
    return DatasetDict(test=Dataset.from_list(docs))
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with one task of 24 questions, ``tiny_choice``."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "tiny.yaml").write_text(TASK)
    (directory / "tiny_data.py").write_text(LOADER)
    return str(directory)
