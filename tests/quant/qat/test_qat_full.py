"""The whole model trained at once, on one process and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import BadInput, Missing
from compress.progress import Silent
from compress.quant.qat import QatSettings, Trained, train_full
from compress.quant.qtensor import Scheme

W3 = Scheme(3, None, True)
QUICK = QatSettings(steps=6, batch=2, learning_rate=1e-3, rate=0.01, anneal=0.34, every=2, watch=3)


def divergence(model: Any, weights: Any, tokens: torch.Tensor) -> float:
    """KL(float || stored), a mean over tokens, in nats."""
    with torch.no_grad():
        log_p = model(tokens).logits.log_softmax(-1)
        dense = {name: value.dense(torch.float32) for name, value in weights.items()}
        log_q = torch.func.functional_call(model, dense, (tokens,)).logits.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def same(one: Trained, other: Trained) -> bool:
    return (
        one.history == other.history
        and one.oscillation == other.oscillation
        and one.rates == other.rates
        and all(
            value.codes.equal(other.weights[name].codes)
            and value.scale.equal(other.weights[name].scale)
            for name, value in one.weights.items()
        )
    )


class Interrupted(Silent):
    def __init__(self, steps: int) -> None:
        self._left = steps

    def advance(self, amount: int) -> None:
        self._left -= amount
        if self._left <= 0:
            raise KeyboardInterrupt


def test_training_draws_the_stored_model_to_the_float_one(
    make_model: Any, make_tokens: Any, projections: Any
) -> None:
    model, tokens = make_model(), make_tokens()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    targets = projections(model, W3)
    settings = replace(QUICK, steps=12, learning_rate=5e-3, soft=1.0, rate=0, anneal=0)
    still = replace(settings, steps=1, learning_rate=1e-12, step_rate=0)
    before = divergence(model, train_full(model, tokens, targets, still).weights, tokens)
    trained = train_full(model, tokens, targets, settings)
    assert divergence(model, trained.weights, tokens) < 0.8 * before
    assert len(trained.history) == 12
    assert trained.weights.keys() == targets.keys() == trained.rates.keys()
    assert all(value.equal(values[name]) for name, value in model.state_dict().items())
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("steps", [3, 5])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    steps: int, make_model: Any, make_tokens: Any, projections: Any, tmp_path: Path
) -> None:
    """Between two journals, and in the annealing."""
    model, tokens = make_model(), make_tokens()

    def run(**more: Any) -> Trained:
        return train_full(model, tokens, projections(model, W3), QUICK, activations=8, **more)

    expected = run()
    journal = tmp_path / "journal.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(journal=journal, progress=Interrupted(steps))
    assert journal.exists()
    assert same(run(journal=journal), expected)
    assert same(run(journal=journal), expected)


def test_refusals(
    make_model: Any,
    make_tokens: Any,
    projections: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = make_model(), make_tokens()
    targets = projections(model, W3)
    with pytest.raises(BadInput, match="there is nothing to train"):
        train_full(model, tokens, {}, QUICK)
    with pytest.raises(BadInput, match=r"qat, step \d: the loss is not finite.*lower qat.learning"):
        train_full(model, tokens, targets, replace(QUICK, rate=3e38))
    start = train_full(model, tokens, targets, replace(QUICK, steps=1)).weights
    with pytest.raises(BadInput, match="only learned steps have a start, got statsq"):
        train_full(model, tokens, targets, replace(QUICK, scale="statsq"), start=start)
    journal = tmp_path / "journal"
    train_full(model, tokens, targets, replace(QUICK, steps=1), journal=journal)
    with pytest.raises(BadInput, match="the journal is that of another training"):
        train_full(model, tokens, targets, QUICK, journal=journal)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(Missing, match="accelerate is not installed; run: pip install accelerate"):
        train_full(model, tokens, targets, QUICK)


TWO_PROCESSES = """
import json, os, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from compress.progress import Silent
from compress.quant.qat import QatSettings, student, train_full
from compress.quant.qtensor import Scheme

class Interrupted(Silent):
    left = 5
    def advance(self, amount):
        self.left -= amount
        if self.left <= 0:
            raise KeyboardInterrupt

directory, sharded = Path(sys.argv[1]), sys.argv[2] == "fsdp2"
Accelerator(mixed_precision="no")
if sharded:  # accelerate takes it up on accelerators only; gloo does it as well
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
kinds = []
adam_state = student.adam_state
def spy(adam, done):
    kinds.extend(isinstance(p, DTensor) for g in adam.param_groups for p in g["params"])
    return adam_state(adam, done)
student.adam_state = spy

model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
job = json.loads((directory / "job.json").read_text())
arguments = (
    model,
    torch.tensor(job["tokens"]),
    dict.fromkeys(job["targets"], Scheme(3, None, True)),
    QatSettings(**job["settings"]),
)
journal = directory / "journal"
try:
    train_full(*arguments, journal=journal, progress=Interrupted())
except KeyboardInterrupt:
    pass
resumed = train_full(*arguments, journal=journal)
whole = train_full(*arguments)
state = PartialState()
found = [
    (t.history, {n: (q.codes, q.scale) for n, q in t.weights.items()}) for t in (resumed, whole)
]
result = (state.num_processes, all(kinds), any(kinds), found)
torch.save(result, directory / str(state.process_index))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(
    kind: str, make_model: Any, make_tokens: Any, projections: Any, tmp_path: Path
) -> None:
    """They share a batch, with FSDP2 the weights too, and resume, to what one alone gives."""
    model, tokens = make_model(), make_tokens()
    model.save_pretrained(tmp_path)
    targets = projections(model, W3)
    job = {
        "tokens": tokens.tolist(),
        "targets": list(targets),
        "settings": asdict(QUICK),
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, tmp_path / "script.py", tmp_path, kind],
        env=os.environ | {"ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone = train_full(model, tokens, targets, QUICK)
    for process in ("0", "1"):
        count, all_sharded, any_sharded, found = torch.load(tmp_path / process)
        assert count == 2
        assert (all_sharded, any_sharded) == (kind == "fsdp2", kind == "fsdp2")
        (resumed_history, resumed), (history, whole) = found
        assert resumed_history == history
        assert history == pytest.approx(alone.history, rel=1e-4)
        for name, (codes, scale) in whole.items():
            assert codes.equal(resumed[name][0])
            assert scale.equal(resumed[name][1])
            changed = codes != alone.weights[name].codes
            assert changed.double().mean() < 0.01
            torch.testing.assert_close(scale, alone.weights[name].scale, rtol=2**-6, atol=0)
