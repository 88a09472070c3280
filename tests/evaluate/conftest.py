"""lm-eval tasks short enough for tiny models, and a cache of one's own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HEAD = """
task: {name}
custom_dataset: !function tiny_data.load
dataset_kwargs: {{count: {count}}}
test_split: test
metadata: {{version: 1.0}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no", "maybe"]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
LIKELIHOOD = """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{word}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: word
repeats: 2
generation_kwargs: {until: ["."], do_sample: true, temperature: 1.0, max_gen_toks: 4}
filter_list:
  - name: first
    filter: [{function: take_first}]
  - name: clean
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_other]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
metadata: {version: 1.0}
"""
BUNDLE = """
group: tiny_bundle
task: [tiny_group, tiny_rolling]
"""
LOADER = """
from datasets import Dataset, DatasetDict

def load(count, **_):
    docs = [
        {"question": f"Is {i * i % 97} even? ", "word": ["no", "yes"][i % 2], "answer": i * 7 % 3}
        for i in range(count)
    ]
    return DatasetDict(test=Dataset.from_list(docs))
"""
TASKS = {
    "tiny_choice": (70, CHOICE),
    "tiny_other": (20, CHOICE),
    "tiny_likelihood": (70, LIKELIHOOD + "tag: tiny_tag\n"),
    "tiny_rolling": (20, ROLLING + "tag: tiny_tag\n"),
    "tiny_generate": (6, GENERATE),
}


def write_task(directory: Path, name: str, body: str, count: int = 20) -> Path:
    """A task file and the loader that it names."""
    directory.mkdir(exist_ok=True)
    (directory / "tiny_data.py").write_text(LOADER)
    (directory / f"{name}.yaml").write_text(HEAD.format(name=name, count=count) + body)
    return directory


@pytest.fixture(scope="session")
def make_task() -> Any:
    return write_task


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory of `TASKS`, group ``tiny_group`` and bundle ``tiny_bundle``. Read-only."""
    directory = tmp_path_factory.mktemp("tasks")
    for name, (count, body) in TASKS.items():
        write_task(directory, name, body, count)
    (directory / "group.yaml").write_text(GROUP)
    (directory / "bundle.yaml").write_text(BUNDLE)
    return str(directory)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval without its survey of the machine, which takes a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


class Recorder:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.totals: dict[str, int] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Any]:
        self.totals[unit] = self.totals.get(unit, 0) + total
        recorder = self

        class Step:
            def advance(self, amount: int) -> None:
                recorder.done[unit] = recorder.done.get(unit, 0) + amount

        yield Step()

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def without_date() -> Any:
    """What of an evaluation's results must not differ between two runs."""

    def strip(results: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in copy.deepcopy(results).items() if key != "date"}

    return strip


@pytest.fixture(scope="session")
def tiny_llava(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of images and text, 64 tokens an image, with its processor. Read-only."""
    pytest.importorskip("PIL")
    import torch
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        CLIPImageProcessorPil,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    common = {"num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    vision = {**common, "hidden_size": 16, "image_size": 64, "patch_size": 8, "projection_dim": 16}
    text = {**common, "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 320}
    config = AutoConfig.for_model(
        "llava",
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", "max_position_embeddings": 256, **text},
        vision_feature_layer=-1,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as initialised, images change next to nothing
            torch.nn.init.normal_(parameter, std=0.15)
    directory = tmp_path_factory.mktemp("models") / "llava"
    model.save_pretrained(directory)
    square = {"height": 64, "width": 64}
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llava_pruned(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llava`, coded, with a policy to keep an eighth of each image. Read-only."""
    from compress import pipeline
    from compress import recipe as recipes
    from compress.checkpoint import TOKENS
    from compress.tokens import TokenPolicy

    directory = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_llava, directory / "dense")
    config = json.loads((directory / "dense" / "config.json").read_text())
    config[TOKENS] = TokenPolicy(layer=1, keep=0.125, selector="uniform").to_json()
    (directory / "dense" / "config.json").write_text(json.dumps(config))
    recipe = recipes.parse({"version": 1, "stages": ["encode_weights"]})
    return pipeline.run(recipe, directory / "dense", directory / "pruned").path
