from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from compress import checkpoint as room
from compress import signals
from compress.errors import BadInput
from compress.signals import BlockTable, collect, find_blocks
from compress.signals.angular import angular_distance
from compress.signals.bucket import bucket_entropy
from compress.signals.cosine import cosine_distance
from compress.signals.diffusion import diffusion_entropy
from compress.signals.effective_rank import effective_rank
from compress.signals.gaussian import gaussian_entropy
from compress.signals.knn import knn_entropy
from compress.signals.matrix_entropy import matrix_entropy
from compress.signals.norm_ratio import norm_ratio
from compress.signals.nuclear_norm import nuclear_norm
from compress.signals.renyi import renyi_kernel_entropy
from compress.signals.table import SCORERS, SCORERS_DEFAULT

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
TOKENS = torch.randint(97, (3, 60), generator=torch.Generator().manual_seed(0))
OF_A_STATE = {
    "knn_entropy": knn_entropy,
    "bucket_entropy": bucket_entropy,
    "renyi_entropy": renyi_kernel_entropy,
    "gaussian_entropy": gaussian_entropy,
    "matrix_entropy": matrix_entropy,
    "effective_rank": effective_rank,
    "nuclear_norm": nuclear_norm,
    "diffusion_entropy": diffusion_entropy,
}
OF_ALL_TOKENS = {
    "entrodrop_knn": knn_entropy,
    "entrodrop_bucket": bucket_entropy,
    "entrodrop_renyi": renyi_kernel_entropy,
}
OF_A_PAIR = {"cosine": cosine_distance, "norm_ratio": norm_ratio, "angular": angular_distance}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def direct(model: Any, tokens: torch.Tensor) -> dict[str, list[list[float]]]:
    """The same from all hidden states at once; the model makes no token massive."""
    values: dict[str, list[list[float]]] = {scorer: [] for scorer in SCORERS}
    with torch.no_grad():
        states = model.model(tokens, output_hidden_states=True).hidden_states
        last = []  # transformers normalises what comes out of the last block
        hook = find_blocks(model)[-1].register_forward_hook(lambda *a: last.append(a[2]))
        model(tokens)
        hook.remove()
    states = [*states[:-1], *last]
    for x, y in pairwise(states):
        pairs = [(a[1:], b[1:]) for a, b in zip(x, y, strict=True)]
        for scorer, entropy in OF_A_STATE.items():
            values[scorer].append([entropy(b) - entropy(a) for a, b in pairs])
        for scorer, distance in OF_A_PAIR.items():
            values[scorer].append([distance(a, b) for a, b in pairs])
        for scorer, entropy in OF_ALL_TOKENS.items():
            values[scorer].append([entropy(b) - entropy(a) for a, b in zip(x, y, strict=True)])
    return values


def assert_close(table: BlockTable, values: dict[str, list[list[float]]]) -> None:
    for scorer, rows in table.values.items():
        for found, expected in zip(rows, values[scorer], strict=True):
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-3), scorer


def test_the_pass_finds_what_all_hidden_states_give(model: LlamaForCausalLM) -> None:
    table = collect(model, TOKENS, scorers=SCORERS)
    assert tuple(table.values) == SCORERS
    assert_close(table, direct(model, TOKENS))
    assert table.sinks == [[0] * 3] * 5


def test_any_scorers_in_any_company_find_the_same(model: LlamaForCausalLM) -> None:
    every = collect(model, TOKENS, scorers=SCORERS)
    default = collect(model, TOKENS)
    assert tuple(default.values) == SCORERS_DEFAULT
    for table in (default, collect(model, TOKENS, scorers=["angular", "effective_rank"])):
        assert table.values == {scorer: every.values[scorer] for scorer in table.values}
        assert table.sinks == every.sinks


def test_an_unknown_scorer_gets_a_hint(model: LlamaForCausalLM) -> None:
    with pytest.raises(BadInput, match="scorer 'renyi_entropi'; did you mean 'renyi_entropy'"):
        collect(model, TOKENS, scorers=["cosine", "renyi_entropi"])


def test_tables_of_two_parts_merge_into_that_of_the_whole(model: LlamaForCausalLM) -> None:
    parts = [collect(model, part, scorers=SCORERS) for part in (TOKENS[:1], TOKENS[1:])]
    assert parts[0].merge(parts[1]) == collect(model, TOKENS, scorers=SCORERS)


def test_the_result_does_not_depend_on_threads_and_leaves_the_model_alone(
    model: LlamaForCausalLM,
) -> None:
    threads = torch.get_num_threads()
    assert collect(model, TOKENS, threads=1) == collect(model, TOKENS, threads=3)
    assert torch.get_num_threads() == threads
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in find_blocks(model))


def test_every_sequence_runs_on_one_thread(model: LlamaForCausalLM) -> None:
    threads = torch.get_num_threads()
    seen = []
    find_blocks(model)[0].register_forward_hook(lambda *a: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        collect(model, TOKENS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 1, 1]


def test_what_happens_between_and_inside_blocks_is_told_apart(model: LlamaForCausalLM) -> None:
    def overwrite(module: Any, args: Any, output: torch.Tensor) -> None:
        args[0].zero_()

    expected = collect(model, TOKENS)
    blocks = find_blocks(model)
    blocks[1].register_forward_hook(overwrite)
    assert collect(model, TOKENS) == expected
    blocks[2].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    doubled = collect(model, TOKENS).values["knn_entropy"]
    states: list[torch.Tensor] = []
    blocks[2].register_forward_hook(lambda module, args, output: states.extend([args[0], output]))
    with torch.no_grad():
        model(TOKENS[:1])
    increase = knn_entropy(states[1][0, 1:]) - knn_entropy(states[0][0, 1:])
    assert doubled[2][0] == pytest.approx(increase, rel=1e-3)


def test_a_state_changed_in_place_between_blocks_is_measured_anew(model: LlamaForCausalLM) -> None:
    def double(module: Any, args: Any) -> None:
        args[0].mul_(2)

    block = find_blocks(model)[2]
    hook = block.register_forward_pre_hook(double)
    table = collect(model, TOKENS[:1])
    hook.remove()
    states: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    block.register_forward_hook(lambda module, args, output: states.extend([args[0], output]))
    with torch.no_grad():
        model(TOKENS[:1])
    increase = knn_entropy(states[1][0, 1:]) - knn_entropy(states[0][0, 1:])
    assert table.values["knn_entropy"][2][0] == pytest.approx(increase, rel=1e-3)


def test_no_state_outlives_its_sequence(model: LlamaForCausalLM) -> None:
    def count(*_: Any) -> None:
        everything = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
        states = [tensor for tensor in everything if tensor.shape[-2:] == (60, 32)]
        alive.append(len(states))

    alive: list[int] = []
    find_blocks(model)[0].register_forward_pre_hook(count)
    collect(model, TOKENS.repeat(2, 1), scorers=SCORERS, threads=1)
    assert len(alive) == 6
    assert alive[-1] <= alive[1]


def test_padding_is_masked(model: LlamaForCausalLM) -> None:
    mask = torch.ones_like(TOKENS)
    mask[:, 52:] = 0
    padded = collect(model, TOKENS.masked_fill(mask == 0, 5), mask, scorers=SCORERS)
    assert_close(padded, dict(collect(model, TOKENS[:, :52], scorers=SCORERS).values))


def test_who_writes_a_sink_is_seen(model: LlamaForCausalLM) -> None:
    def write(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 7] *= 1e4
        return output

    states: list[torch.Tensor] = []
    block = find_blocks(model)[2]
    block.register_forward_hook(write)
    block.register_forward_hook(lambda module, args, output: states.extend([args[0], output]))
    table = collect(model, TOKENS, threads=1)
    assert [table.writes_sink(block) for block in range(5)] == [False, False, True, False, False]
    assert table.order("cosine", [])[-1] == 2
    keep = [i for i in range(60) if i not in (0, 7)]
    before, after = (bucket_entropy(state[0, keep]) for state in states[:2])
    assert table.values["bucket_entropy"][2][0] == pytest.approx(after - before, abs=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_block(
    model: LlamaForCausalLM, value: float
) -> None:
    blocks = find_blocks(model)
    blocks[3].mlp.down_proj.weight.data[0, 0] = value
    with pytest.raises(BadInput, match="block 3: activations are not finite"):
        collect(model, TOKENS)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[:, :20], r"calibration\.length: .*got 20, expected 50 or more"),
        (TOKENS.repeat(1, 3), r"calibration\.length: .*got 180, expected at most 128"),
        (
            TOKENS * 0 + 97,
            "tokenizer does not fit the model, got token 97, expected less than .* 97",
        ),
        (TOKENS[0], r"not in sequences, got \[60\], expected \[sequences, length\]"),
        (TOKENS[:0], r"not in sequences, got \[0, 60\]"),
    ],
)
def test_tokens_that_the_model_cannot_take(
    model: LlamaForCausalLM, tokens: torch.Tensor, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        collect(model, tokens)


@pytest.mark.parametrize("scorers", [SCORERS_DEFAULT, ["entrodrop_bucket"]])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 59), r"mask does not fit the tokens, got \[3, 59\], expected \[3, 60\]"),
        (torch.ones(60), r"got \[60\], expected \[3, 60\]"),
        (torch.arange(60).lt(40) * torch.tensor([[1], [1], [0]]), "sequence 2: .* got 0, expected"),
        (torch.arange(60).lt(25).repeat(3, 1), "sequence 0: .*got 25, expected more than 25"),
    ],
)
def test_masks_that_do_not_fit(
    model: LlamaForCausalLM, mask: torch.Tensor, message: str, scorers: list[str]
) -> None:
    with pytest.raises(BadInput, match=message):
        collect(model, TOKENS, mask, scorers=scorers)


def test_too_many_sinks_leave_too_few_tokens_but_to_those_who_see_all(
    model: LlamaForCausalLM,
) -> None:
    def write(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 26:50] *= 1e4
        return output

    find_blocks(model)[2].register_forward_hook(write)
    with pytest.raises(BadInput, match="block 2: too few ordinary tokens .* got 25, expected more"):
        collect(model, TOKENS[:, :50])
    assert collect(model, TOKENS[:, :50], scorers=["entrodrop_knn"]).blocks == 5


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_model_of_protected_blocks_leaves_no_order(blocks: int) -> None:
    made = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": blocks})).eval()
    table = collect(made, TOKENS)
    assert table.order("cosine") == []
    assert table.stability("cosine") is None
    assert set(table.agreement().values()) == {None}


@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "distilbert"])
def test_other_families_have_blocks_too(family: str) -> None:
    aliases = {"n_embd": 32, "n_layer": 5, "n_head": 4} if family == "gpt2" else SIZES
    aliases = {"n_layers": 5, "dim": 32, "n_heads": 4} if family == "distilbert" else aliases
    config = AutoConfig.for_model(family, **{**aliases, "vocab_size": 97})
    table = collect(AutoModel.from_config(config).eval(), TOKENS)
    assert table.blocks == 5
    assert all(len(table.values[scorer][0]) == 3 for scorer in SCORERS_DEFAULT)


@pytest.mark.parametrize("family", ["t5", "albert"])
def test_a_model_without_one_stack_is_refused(family: str) -> None:
    config = AutoConfig.for_model(family, vocab_size=97)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with pytest.raises(BadInput, match="no single stack of transformer blocks"):
        find_blocks(model)


def test_lists_inside_blocks_are_not_the_stack(model: LlamaForCausalLM) -> None:
    for block in model.model.layers:
        block.experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(5))
    assert find_blocks(model) is model.model.layers


@dataclass(frozen=True)
class Text:
    data: str = "builtin:calibration"
    sequences: int = 2
    length: int = 64
    seed: int = 0


def test_measure_from_a_checkpoint(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = room.open(make_llama(tmp_path, num_hidden_layers=4))
    found = signals.measure(checkpoint, Text())
    assert found.table.blocks == 4
    assert found.protected == {0, 1, 3}
    assert found.orders() == {scorer: [2] for scorer in SCORERS_DEFAULT}
    assert found == signals.measure(checkpoint, Text())
    assert found != signals.measure(checkpoint, Text(seed=1))


def test_measure_what_is_asked_for(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = room.open(make_llama(tmp_path, num_hidden_layers=5))
    scorers = ("angular", "gaussian_entropy")
    found = signals.measure(checkpoint, Text(), scorers=scorers, drop=2)
    assert found.header == ("block", *scorers, "note")
    assert set(found.stability()) == set(found.to_json()["scores"]) == set(scorers)
    assert found.to_json()["stability"]["angular"]["same_choice"] == 1  # both that may go
    with pytest.raises(BadInput, match="unknown scorer"):
        signals.measure(checkpoint, Text(), scorers=["cosin"])


def test_measure_on_too_short_a_text(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """A byte is a token, and each of the two documents ends in an empty line."""
    (tmp_path / "text.jsonl").write_text(f'{{"text": "{"a" * 98}"}}\n' * 2)
    checkpoint, data = room.open(make_llama(tmp_path / "model")), str(tmp_path / "text.jsonl")
    assert signals.measure(checkpoint, Text(data, sequences=3)).table.sequences == 3
    with pytest.raises(BadInput, match=r"short for 4 windows of 64 tokens, got 3 .*\(200 tokens"):
        signals.measure(checkpoint, Text(data, sequences=4))


def test_activations_whose_scores_overflow(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = room.open(make_llama(tmp_path)).load_model(dtype="float32")
    model.model.layers[2].mlp.down_proj.weight.data.fill_(3e38)
    with pytest.raises(BadInput, match="block [23]: activations are"):
        collect(model, torch.arange(128).reshape(2, 64))
