"""lm-eval's own `--model hf` evaluates a coded checkpoint as it does the dense one, and so does
`--model entropress`, which it knows without being told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers

REPOSITORY = Path(__file__).parents[2]
TEXTS = [("a b c", " d e"), ("b b", " a"), ("", "e d c b a")]
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: context
doc_to_target: target
"""


@pytest.fixture
def tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>"
    )


def test_log_likelihoods_are_the_same(llama, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    requests = [
        Instance("loglikelihood", {}, arguments, index) for index, arguments in enumerate(TEXTS)
    ]
    results = []
    for directory in llama:
        tokenizer.save_pretrained(directory)
        for kind in (HFLM, get_model("entropress")):
            model = kind(
                pretrained=str(directory), device="cpu", batch_size=1, softmax_dtype="float32"
            )
            results.append(model.loglikelihood(requests, disable_tqdm=True))
    assert all(result == results[0] for result in results)
    assert len({value for value, _ in results[0]}) == len(TEXTS)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables for a fresh interpreter that sees the package as an installed one."""
    site = tmp_path_factory.mktemp("site")
    for name in ("compress", "_entropress_autoload.py"):
        (site / name).symlink_to(REPOSITORY / name)
    info = site / "entropress-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entropress\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nentropress = _entropress_autoload:autoload\n"
    )
    cache = {"HF_DATASETS_CACHE": str(site / "datasets"), "HF_HUB_OFFLINE": "1"}
    return os.environ | cache | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}


def python(*arguments, environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=Path(sys.executable).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("order", ["torch, lm_eval.models", "lm_eval.models, torch"])
def test_lm_eval_knows_the_model_type_unasked(order, environment):
    code = f"""
import sys, {order}
from lm_eval.api.registry import model_registry
assert {{"entropress", "hf"}} <= set(model_registry)
assert not {{"transformers", "compress.evaluate", "compress.checkpoint"}} & set(sys.modules)
"""
    run = python("-c", code, environment=environment)
    assert run.returncode == 0, run.stderr


def test_switched_off_it_does_not(environment):
    code = "import torch, lm_eval.models, lm_eval.api.registry as registry"
    code += "; assert list(registry.model_registry) == list(lm_eval.models.MODEL_MAPPING)"
    run = python("-c", code, environment=environment | {"ENTROPRESS_AUTOLOAD": "0"})
    assert run.returncode == 0, run.stderr


def test_a_registry_that_refuses_breaks_nothing(environment):
    code = """
import lm_eval.api.registry as registry
accept = registry.Registry.register
def refuse(self, name, **options):
    assert name != "entropress", "refused"
    return accept(self, name, **options)
registry.Registry.register = refuse
import torch, lm_eval.models
print("hf" in registry.model_registry)
"""
    run = python("-c", code, environment=environment)
    assert run.stdout == "True\n", run.stderr
    assert run.stderr.count("cannot register with lm-eval: refused") == 1


@pytest.mark.slow
def test_the_command_line_evaluates_a_coded_checkpoint(llama, tokenizer, environment, tmp_path):
    dense, coded = llama
    data = tmp_path / "letters.jsonl"
    data.write_text("".join(json.dumps({"context": a, "target": b}) + "\n" for a, b in TEXTS if a))
    (tmp_path / "letters.yaml").write_text(TASK.replace("DATA", str(data)))
    scores = []
    for kind, directory in (("hf", dense), ("entropress", coded)):
        tokenizer.save_pretrained(directory)
        run = python(
            *("-m", "lm_eval", "run", "--model", kind, "--tasks", "letters"),
            *("--model_args", f"pretrained={directory},softmax_dtype=float32"),
            *("--include_path", tmp_path, "--device", "cpu", "--batch_size", "2"),
            *("--output_path", tmp_path / kind),
            environment=environment,
        )
        assert run.returncode == 0, run.stderr
        (results,) = (tmp_path / kind).rglob("results_*.json")
        scores.append(json.loads(results.read_text())["results"]["letters"])
    assert scores[0] == scores[1]
