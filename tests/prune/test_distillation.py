"""Training what is left of a model on what the whole one says, with units that fade."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import checkpoint as room
from compress.errors import BadInput, Corrupt, Missing
from compress.prune import (
    Removal,
    RemovalLoss,
    find_stack,
    find_units,
    fit_linear_heal,
    output_without,
    without,
)
from compress.prune.distillation import Distillation, Distilled, distill
from compress.prune.student import Gates, Student
from compress.signals import load_float32, windows

BLOCKS: Removal = frozenset({("block", 2), ("block", 4)})
PARTS: Removal = frozenset({("attention", 2), ("mlp", 4)})
FAMILIES = ("gemma2", "gpt_neox", "opt", "gpt2", "qwen3_moe")
QUICK = Distillation(steps=4, batch=2, rate=1e-3, every=2)


def text(seed: int, sequences: int = 8, length: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 97, (sequences, length), generator=generator)


def parts_of(model: Any, removed: Removal) -> Mapping[Any, Any]:
    return {} if removed == BLOCKS else find_units(model, "joint").parts


def train(model: Any, tokens: torch.Tensor, removed: Removal, *rest: Any, **more: Any) -> Distilled:
    return distill(model, tokens, removed, *rest, parts=parts_of(model, removed), **more)


def with_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    other = copy.deepcopy(model)
    for name, value in weights.items():
        other.get_parameter(name).data.copy_(value)
    return other


def divergence(model: Any, student: Any, tokens: torch.Tensor, removed: Removal) -> float:
    """KL(model || student without the units), a mean over tokens, in nats."""
    with torch.no_grad(), without(student, removed, parts_of(student, removed)):
        log_q = student(tokens).logits.log_softmax(-1)
    with torch.no_grad():
        log_p = model(tokens).logits.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "removed"),
    [
        ("llama", BLOCKS),
        ("llama", PARTS),
        *(pytest.param(family, PARTS, marks=pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_the_loss_falls_on_its_text_and_on_other(
    family: str, removed: Removal, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    options = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {}
    model = make_family(family, tmp_path, **options)
    settings = Distillation(steps=24, batch=2, rate=3e-3, dilution=0.25)
    tokens, fresh = text(1), text(2)
    result = train(model, tokens, removed, settings)
    student = with_weights(model, result.weights)
    assert len(result.history) == 24
    assert result.history[-1] < 0.7 * max(result.history)
    for seen in (tokens, fresh):
        before = divergence(model, model, seen, removed)
        assert divergence(model, student, seen, removed) < 0.9 * before


@pytest.mark.parametrize("removed", [BLOCKS, PARTS])
def test_what_is_trained_is_the_pruned_model(
    removed: Removal, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    """Bit for bit, the moment that the units have faded."""
    model = make_family("llama", tmp_path)
    tokens, parts = text(3, 1), parts_of(model, removed)
    states: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda *seen: states.append(seen[2][0].detach()))
    result = train(model, tokens, removed, Distillation(steps=1, batch=1, dilution=0))
    hook.remove()
    assert states[-2].equal(output_without(model, tokens[0], frozenset()))
    assert states[-1].equal(output_without(model, tokens[0], removed, parts))
    [expected] = RemovalLoss(model, tokens, parts=parts)([removed])
    assert result.history == pytest.approx([expected], rel=1e-5)


def test_units_fade_and_are_then_not_computed(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    settings = Distillation(steps=8, batch=1, dilution=0.5)
    shares = [settings.share(step) for step in range(8)]
    assert shares == [0.75, 0.5, 0.25, 0, 0, 0, 0, 0]
    model = make_family("llama", tmp_path)
    runs: list[int] = []
    for index in (2, 3):
        mlp = model.model.layers[index].mlp
        mlp.register_forward_hook(lambda *seen, index=index: runs.append(index))
    history = train(model, text(4), BLOCKS, settings).history
    # Two passes find out what to train, then each step has the whole model's and the student's.
    assert (runs.count(3), runs.count(2)) == (2 + 2 * 8, 1 + 8 + 3)
    assert history[0] < 0.3 * history[3]


def test_the_rate_rises_and_falls_and_every_sequence_has_its_turn() -> None:
    settings = Distillation(steps=40, batch=3, rate=0.5)
    paces = [settings.pace(step) for step in range(40)]
    assert paces[0] == 0.25
    assert paces[1:] == sorted(paces[1:], reverse=True)
    assert paces[1] > 0.49
    assert 0 < paces[-1] < 0.01
    places = [row for step in range(40) for row in settings.rows(step, 5)]
    turns = [places[at : at + 5] for at in range(0, 120, 5)]
    assert all(sorted(turn) == [0, 1, 2, 3, 4] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 10
    assert places != [
        row for step in range(40) for row in Distillation(steps=40, batch=3, seed=1).rows(step, 5)
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_is_that_of_the_divergence(
    temperature: float, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model, [row] = make_family("llama", tmp_path).requires_grad_(False), text(5, 1)
    name = "model.layers.3.mlp.up_proj.weight"
    gates = Gates({("block", 2): model.model.layers[2]})
    weights = {name: model.get_parameter(name) + 0.05}
    student = Student(model, gates, weights, [name], temperature)
    with gates.mounted():
        back, loss = student(row, 0.5)
    back.backward()

    plain = with_weights(model, weights)
    parameter = plain.get_parameter(name).requires_grad_(True)
    plain.model.layers[2].register_forward_hook(lambda module, args, x: (args[0] + x) / 2)
    log_p = (model(row[None]).logits[0] / temperature).log_softmax(-1)
    log_q = (plain(row[None]).logits[0] / temperature).log_softmax(-1)
    expected = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        next(student.parameters()).grad, parameter.grad, rtol=1e-4, atol=1e-7
    )


class Interrupted:
    """Progress that ends the work, as Ctrl-C would, before its n-th step is told."""

    def __init__(self, n: int) -> None:
        self.left = n

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Interrupted]:
        yield self

    def advance(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, line: str) -> None:
        raise AssertionError(line)


def same(one: Distilled, other: Distilled) -> bool:
    weights = all(one.weights[name].equal(other.weights[name]) for name in one.weights)
    return weights and one.weights.keys() == other.weights.keys() and one.history == other.history


@pytest.mark.parametrize("removed", [BLOCKS, PARTS])
def test_going_on_gives_the_bits_of_going_through(
    removed: Removal, make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model, journal = make_family("llama", tmp_path), tmp_path / "journal"
    through = train(model, text(6), removed, QUICK)
    assert same(through, train(model, text(6), removed, QUICK))
    for steps in (1, 3):  # before a journal, and a step after it
        with pytest.raises(KeyboardInterrupt):
            train(model, text(6), removed, QUICK, journal=journal, progress=Interrupted(steps))
    assert same(through, train(model, text(6), removed, QUICK, journal=journal))
    left = journal.read_bytes()
    assert same(through, train(model, text(6), removed, QUICK, journal=journal))
    assert journal.read_bytes() == left
    other = train(model, text(6), removed, Distillation(steps=4, batch=2, rate=1e-3, seed=1))
    assert not same(through, other)


def test_the_model_is_left_as_it_was(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("llama", tmp_path)
    model.model.norm.weight.requires_grad_(False)
    own = model.model.layers[2].forward = model.model.layers[2].forward  # as accelerate does
    parameters = dict(model.named_parameters())
    values = {name: value.clone() for name, value in model.state_dict().items()}

    def unchanged() -> bool:
        now = dict(model.named_parameters())
        learning = {name for name, parameter in now.items() if parameter.requires_grad}
        return (
            all(now[name] is parameter for name, parameter in parameters.items())
            and all(value.equal(values[name]) for name, value in model.state_dict().items())
            and learning == parameters.keys() - {"model.norm.weight"}
            and all(parameter.grad is None for parameter in now.values())
            and [i for i, block in enumerate(model.model.layers) if "forward" in vars(block)] == [2]
            and model.model.layers[2].forward is own
        )

    assert unchanged()
    result = train(model, text(7), BLOCKS, QUICK)
    assert unchanged()
    assert not any(value.equal(values[name]) for name, value in result.weights.items())
    with pytest.raises(KeyboardInterrupt):
        train(model, text(7), BLOCKS, QUICK, progress=Interrupted(1))
    assert unchanged()


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
AROUND = {  # gemma2's norms before and after
    "attention": {"input_layernorm", "post_attention_layernorm"},
    "mlp": {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
}


def test_what_is_trained(make_family: Callable[..., Any], tmp_path: Path) -> None:
    """None of what only the removed units have, be it before or after the module that is gated."""
    steps = {"steps": 1, "batch": 1}
    model = make_family("gemma2", tmp_path, tie_word_embeddings=True)

    def names(kind: str, removed: Removal = PARTS) -> set[str]:
        return set(train(model, text(8), removed, Distillation(train=kind, **steps)).weights)

    def inside(block: int, inner: set[str]) -> set[str]:
        return {f"model.layers.{block}.{name}.weight" for name in inner}

    blocks = range(6)
    gone = inside(2, ATTENTION | AROUND["attention"]) | inside(4, MLP | AROUND["mlp"])
    projections = set[str]().union(*(inside(i, ATTENTION | MLP) for i in blocks)) - gone
    norms = set[str]().union(*(inside(i, AROUND["attention"] | AROUND["mlp"]) for i in blocks))
    norms = norms - gone | {"model.norm.weight"}
    assert names("projections") == projections
    assert names("norms") == norms
    assert names("all") == projections | norms
    model = make_family("llama", tmp_path, tie_word_embeddings=False)
    found = names("all", BLOCKS)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} < found
    assert not [name for name in found if name.startswith(("model.layers.2.", "model.layers.4."))]


def test_nothing_to_train(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model = make_family("llama", tmp_path, tie_word_embeddings=True)
    every = frozenset(("block", i) for i in range(6))
    with pytest.raises(BadInput, match="nothing left to train, got projections"):
        distill(model, text(9), every, QUICK)


def test_a_start_is_where_it_begins(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model, tokens = make_family("llama", tmp_path), text(10, 2)
    name, fixed = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    start = {each: model.get_parameter(each).detach() + 0.05 for each in (name, fixed)}
    settings = Distillation(steps=1, dilution=0, rate=1e-30, batch=2, train="norms")
    result = distill(model, tokens, BLOCKS, settings, start=start)
    expected = divergence(model, with_weights(model, start), tokens, BLOCKS)
    assert result.history == pytest.approx([expected], rel=1e-4)
    assert all(result.weights[each].equal(start[each]) for each in start)
    trained = distill(model, tokens, BLOCKS, QUICK, start={name: start[name]}).weights[name]
    assert 0 < (trained - start[name]).abs().max() < 0.01
    for strange in ({"model.layers.1.down": torch.zeros(1)}, {name: torch.zeros(3)}):
        with pytest.raises(BadInput, match=r"no such weight to start from, got \[\d\], expected"):
            distill(model, tokens, BLOCKS, QUICK, start=strange)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"batch": 0},
        {"every": 0},
        {"rate": 0.0},
        {"rate": float("inf")},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"dilution": -0.1},
        {"dilution": 1.1},
        {"train": "norm"},
    ],
)
def test_settings_that_make_no_training(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"distillation.{next(iter(options))}: makes no training"):
        Distillation(**options)


def test_journals_of_others_and_damaged_ones(
    make_family: Callable[..., Any], tmp_path: Path
) -> None:
    model, journal = make_family("llama", tmp_path), tmp_path / "journal"
    settings = Distillation(steps=2, batch=1)
    name = "model.layers.1.mlp.down_proj.weight"
    start = {name: torch.zeros_like(model.get_parameter(name))}

    def again(**other: Any) -> Distilled:
        run = {"tokens": text(11), "removed": BLOCKS, "settings": settings, **other}
        return distill(model, journal=journal, **run)

    done = again()
    assert same(done, again(settings=Distillation(steps=2, batch=1, every=1)))
    others: list[dict[str, Any]] = [
        {"tokens": text(12)},
        {"removed": frozenset({("block", 2)})},
        {"settings": Distillation(steps=3, batch=1)},
        {"subject": "another"},
        {"start": start},
    ]
    for other in others:
        with pytest.raises(BadInput, match="journal: the journal is that of another distillation"):
            again(**other)
    sound = bytearray(journal.read_bytes())
    flipped = sound.copy()
    flipped[len(flipped) // 2] ^= 1
    model.save_pretrained(tmp_path)
    foreign = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (sound[:-1], sound[:100], b"", b"{}", flipped, foreign):
        journal.write_bytes(damaged)
        with pytest.raises(Corrupt, match="journal: "):
            again()
    journal.write_bytes(sound)
    assert same(done, again())


def test_what_cannot_be_distilled(
    make_family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_family("llama", tmp_path)
    with pytest.raises(BadInput, match="no such unit to remove, got block 6, expected one of 6"):
        distill(model, text(13), frozenset({("block", 6)}), QUICK)
    with pytest.raises(BadInput, match="no such unit to remove, got attention 2"):
        distill(model, text(13), PARTS, QUICK)
    with pytest.raises(BadInput, match="token 97, expected less than vocab_size 97"):
        distill(model, text(13) + 1, BLOCKS, QUICK)
    with pytest.raises(BadInput, match=r"step \d+: the loss is not finite, .*lower distillation"):
        distill(model, text(13), BLOCKS, Distillation(steps=9, rate=1e30))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(Missing, match="accelerate is not installed; run: pip install accelerate"):
        distill(model, text(13), BLOCKS, QUICK)


TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from accelerate import PartialState
from compress.errors import BadInput
from compress.prune.distillation import Distillation, distill

directory = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
tokens = torch.tensor(json.loads((directory / "tokens.json").read_text()))
removed = frozenset({("block", 2), ("block", 4)})
settings = Distillation(steps=6, batch=4, rate=1e-3, every=2)
done = distill(model, tokens, removed, settings, journal=directory / "journal")
state = PartialState()
try:
    distill(model, tokens, removed, Distillation(batch=3))
except BadInput as error:
    print(error, file=sys.stderr)
torch.save((state.num_processes, done.weights, done.history), directory / str(state.process_index))
"""


@pytest.mark.slow
def test_two_processes_share_a_batch(make_family: Callable[..., Any], tmp_path: Path) -> None:
    model, tokens = make_family("llama", tmp_path), text(14)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
    command = [*launch, tmp_path / "script.py", tmp_path]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "processes cannot share a batch, got 3, expected a multiple of 2" in done.stderr
    alone = distill(model, tokens, BLOCKS, Distillation(steps=6, batch=4, rate=1e-3))
    for process in ("0", "1"):
        count, weights, history = torch.load(tmp_path / process)
        assert count == 2
        assert history == pytest.approx(alone.history, rel=1e-4)
        assert weights.keys() == alone.weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, alone.weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_it_undoes_more_of_the_damage_to_smollm2_than_the_linear_fold_it_starts_from() -> None:
    try:
        original = room.open(room.resolve("demo:smollm2-135m"))
    except Exception as error:
        pytest.skip(str(error))
    model, tokenizer = load_float32(original), original.tokenizer()
    stack = find_stack(original.tensor_infos(), 30)
    tokens = windows("builtin:calibration", tokenizer, 240, 128, 0)
    heldout = windows("builtin:heldout", tokenizer, 6, 256, 0)
    removed: Removal = frozenset({("block", 14), ("block", 25)})
    fold = fit_linear_heal(model, tokens[:16].view(8, 256), removed, stack)
    settings = Distillation(steps=24, batch=2, dilution=0)
    result = distill(model, tokens, removed, settings, start=fold)
    before, folded, after = (
        divergence(model, with_weights(model, weights), heldout, removed)
        for weights in ({}, fold, result.weights)
    )
    assert folded < before
    assert after < folded - 0.03 * before
