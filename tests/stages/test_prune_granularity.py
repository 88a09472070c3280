"""Parts of blocks, searches and budgets through the stage: chosen, proven, verified, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import checkpoint as room
from compress import pipeline, stages
from compress import recipe as recipes
from compress.errors import BadInput
from compress.hf.skipping import skip_sublayers
from compress.progress import Silent, Step
from compress.prune import MEASURES, PROPOSING, SEARCHES, find_units, savings
from compress.signals import load_float32, ordinary_tokens, windows
from compress.stages import Calibration, StageReport, Workspace
from compress.workspace import workspace_path

STAGE = stages.get("prune_blocks")
TEXT = Calibration(sequences=3, length=64)
EVOLUTION = {"generations": 3, "offspring": 4, "survivors": [2, 1], "tokens": [64, 192]}
KINDS = {
    "block": ("block",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "joint": ("attention", "mlp"),
}

FAST = [
    *(("one_shot", "block"), ("one_shot", "joint"), ("best_scorer", "joint")),
    *(("iterative", "attention"), ("greedy", "mlp"), ("evolutionary", "block")),
]


def prune(source: Path, directory: Path, **options: Any) -> tuple[room.Checkpoint, StageReport]:
    config = STAGE.Config.model_validate({"evolution": EVOLUTION, **options})
    return STAGE.run(room.open(source), config, Workspace(directory, TEXT, threads=1))


def recipe(*chosen: object) -> recipes.Recipe:
    calibration = TEXT.model_dump()
    document = {"version": 1, "calibration": calibration, "stages": list(chosen)}
    return recipes.parse(document)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_the_lowest_scores_go(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    pruned, report = prune(
        tiny_llama, tmp_path / "out", granularity=kind, drop=2, scorer="norm_ratio"
    )
    scores = report.metrics["signals"][kind]["scores"]["norm_ratio"]
    lowest = sorted(sorted(range(2, 5), key=lambda block: scores[block])[:2])
    assert report.metrics["removed"] == {kind: lowest}
    first, second = lowest
    assert report.summary == (
        f"{kind} of blocks {first}, {second} of 6 removed, chosen by norm_ratio"
    )
    assert pruned.config["per_layer_config"] == {str(block): {"skip": [kind]} for block in lowest}
    assert report.removed == []
    assert report.renamed == {}
    for name in pruned.tensor_infos():
        same = torch.equal(pruned.read(name), room.open(tiny_llama).read(name))
        assert same != (name in report.changed)


def test_scores_are_of_the_part(tiny_llama: Path, tmp_path: Path) -> None:
    """The norm ratio of an attention by hand: what it adds over what is then in the stream."""
    _, report = prune(tiny_llama, tmp_path / "out", granularity="attention", drop=1)
    model = room.open(tiny_llama).load_model(dtype="float32")
    text = room.open(tiny_llama).tokenizer()
    states = {}

    def keep(module: object, args: tuple, kwargs: dict) -> None:
        states["x"] = (args[0] if args else kwargs["hidden_states"])[0]

    def add(module: object, args: tuple, output: tuple) -> None:
        states["added"] = output[0][0]

    block = model.model.layers[2]
    block.register_forward_pre_hook(keep, with_kwargs=True)
    block.self_attn.register_forward_hook(add)
    ratios = []
    for window in windows(TEXT.data, text, TEXT.sequences, TEXT.length, TEXT.seed):
        with torch.no_grad():
            model(input_ids=window[None])
        x, y = states["x"], states["x"] + states["added"]
        keep_them = ordinary_tokens(x, y, torch.ones(len(x), dtype=torch.bool))
        ratio = states["added"].norm(dim=1) / y.norm(dim=1)
        ratios.append(ratio[keep_them].mean().item())
    scores = report.metrics["signals"]["attention"]["scores"]["norm_ratio"]
    assert scores[2] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


@pytest.mark.parametrize("granularity", ["attention", "joint"])
def test_through_a_recipe_zeros_cost_nothing_and_stock_transformers_is_right(
    granularity: str, tiny_llama: Path, tmp_path: Path
) -> None:
    whole = pipeline.run(recipe("encode_weights"), tiny_llama, tmp_path / "whole")
    asked = {
        "prune_blocks": {"granularity": granularity, "drop": 4, "protect": [0], "scorer": "cosine"}
    }
    result = pipeline.run(recipe(asked, "encode_weights"), tiny_llama, tmp_path / "out")
    assert result.bytes_out < 0.95 * whole.bytes_out
    [metrics, _] = [stage["metrics"] for stage in result.manifest["stages"]]
    removed = metrics["removed"]
    tensors = {"attention": 4, "mlp": 3}
    zeroed = sum(tensors[kind] * len(blocks) for kind, blocks in removed.items())
    verified = compress.verify(tmp_path / "out", tiny_llama)
    assert verified.ok
    assert len(verified.not_compared) == zeroed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        stock = model(input_ids=tokens).logits
        skipped = skip_sublayers(model)(input_ids=tokens).logits
    assert torch.equal(stock.view(torch.int32), skipped.view(torch.int32))


@pytest.mark.parametrize(
    ("search", "granularity"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in product(SEARCHES, KINDS)
    ],
)
def test_every_search_reports_in_the_agreed_form(
    search: str, granularity: str, tiny_llama: Path, tmp_path: Path
) -> None:
    pruned, report = prune(
        tiny_llama, tmp_path / "out", granularity=granularity, drop=2, search=search
    )
    metrics = json.loads(report.model_dump_json())["metrics"]
    assert set(metrics) == {
        *("granularity", "blocks", "removed", "signals", "stability", "candidates", "search"),
        *("budget", "healing", "bytes_in", "bytes_out", "stale_patterns"),
    }
    assert (metrics["granularity"], metrics["blocks"]) == (granularity, 6)
    assert metrics["budget"] == {"measure": "drops", "asked": 2, "reached": 2}
    kinds = KINDS[granularity]
    assert set(metrics["signals"]) == set(kinds)
    for table in metrics["signals"].values():
        assert (table["blocks"], table["protected"]) == (6, [0, 1, 5])
    assert (metrics["stability"] is None) == (granularity == "joint")

    def sane(removed: dict[str, list[int]]) -> bool:
        return (
            set(removed) <= set(kinds)
            and all(
                blocks and blocks == sorted({*blocks} & {2, 3, 4}) for blocks in removed.values()
            )
            and sum(map(len, removed.values())) == 2
        )

    assert sane(metrics["removed"])
    assert "knn_entropy" in [each["rule"] for each in metrics["candidates"]]
    every = search in ("best_scorer", "evolutionary")
    for each in metrics["candidates"]:
        assert set(each) == {"rule", "removed", "kl"}
        assert sane(each["removed"])
        assert (each["kl"] is None) != every
    assert len(metrics["candidates"]) == (len(PROPOSING) if every else 4)
    found = metrics["search"]
    if search == "one_shot":
        assert found is None
        assert "chosen by knn_entropy" in report.summary
    else:
        assert set(found) == {"method", "history", "one_shot_kl", "found_kl", "kept"}
        assert found["method"] == search
        assert len(found["history"]) == (4 if search == "evolutionary" else 0)
        better = found["found_kl"] < found["one_shot_kl"]
        assert found["kept"] == ("found" if better else "one_shot")
        assert search.replace("_", " ") in report.summary
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == (4 if granularity == "block" else 6)
    if granularity == "block":
        assert metrics["bytes_out"] < metrics["bytes_in"]
        assert report.changed == []
    else:
        skips = pruned.config["per_layer_config"]
        named = {
            kind: sorted(int(i) for i, e in skips.items() if kind in e["skip"]) for kind in kinds
        }
        assert metrics["removed"] == {kind: blocks for kind, blocks in named.items() if blocks}
        assert metrics["bytes_out"] == metrics["bytes_in"]
        assert {name.split(".")[2] for name in report.changed} == set(skips)


def test_the_unseen_text_is_none_of_the_search(tiny_llama: Path, tmp_path: Path) -> None:
    """Scores of a search are those of a one-shot run: the held-out windows come after."""
    tables = [
        prune(tiny_llama, tmp_path / search, drop=1, search=search)[1].metrics["signals"]
        for search in ("one_shot", "greedy")
    ]
    assert tables[0] == tables[1]


def test_the_two_kls_are_of_the_windows_after_the_calibration(
    tiny_llama: Path, tmp_path: Path
) -> None:
    _, report = prune(tiny_llama, tmp_path / "out", drop=1, scorer="last_k", search="greedy")
    model = load_float32(room.open(tiny_llama))
    rows = windows(TEXT.data, room.open(tiny_llama).tokenizer(), 4, TEXT.length, TEXT.seed)
    losses = []
    for text in (rows[:3], rows[3:]):
        kl = {i: loss_of(model, text, i) for i in (2, 3, 4)}
        losses.append(kl)
    seen, unseen = losses
    best = min(seen, key=lambda i: seen[i])
    search = report.metrics["search"]
    assert search["one_shot_kl"] == pytest.approx(unseen[4], rel=1e-4)
    assert search["found_kl"] == pytest.approx(unseen[best], rel=1e-4)
    expected = best if unseen[best] < unseen[4] else 4
    assert report.metrics["removed"] == {"block": [expected]}


def loss_of(model: Any, text: torch.Tensor, block: int) -> float:
    def skip(module: Any, args: Any, output: Any) -> Any:
        return args[0]

    with torch.no_grad():
        full = model(text).logits.double().log_softmax(-1)
        hook = model.model.layers[block].register_forward_hook(skip)
        pruned = model(text).logits.double().log_softmax(-1)
        hook.remove()
    return float((full.exp() * (full - pruned)).sum(-1).mean())


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("granularity", ["block", "mlp", "joint"])
def test_a_budget_is_met_and_nothing_can_come_back(
    granularity: str, measure: str, tiny_llama: Path, tmp_path: Path
) -> None:
    share = 0.27 if granularity != "mlp" else 0.13
    options = {"granularity": granularity, "budget": {measure: share}, "protect": [0]}
    config = STAGE.Config(**options)
    estimate = STAGE.plan(room.open(tiny_llama), config, TEXT)
    pruned, report = prune(tiny_llama, tmp_path / "out", **options)
    model = load_float32(room.open(tiny_llama))
    units = find_units(model, granularity)
    costs, total = savings(measure, model, room.open(tiny_llama), units, TEXT.length)
    gone = [(kind, i) for kind, blocks in report.metrics["removed"].items() for i in blocks]
    spent = sum(costs[unit] for unit in gone)
    assert spent / total >= share
    assert all((spent - costs[unit]) / total < share for unit in gone)
    assert report.metrics["budget"] == {
        "measure": measure,
        "asked": share,
        "reached": round(spent / total, 6),
    }
    size = sum(info.nbytes for info in pruned.tensor_infos().values())
    assert size <= estimate.nbytes
    assert (size == estimate.nbytes) == (granularity != "block")
    assert f"{share} of the {measure.replace('_', ' ')}" in estimate.changes[0]
    if measure == "parameters" and granularity == "block":
        assert size <= (1 - share) * report.metrics["bytes_in"]


def test_a_budget_of_coded_bytes_shows_in_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    asked = {"prune_blocks": {"budget": {"coded_bytes": 0.3}, "protect": []}}
    whole = pipeline.run(recipe("encode_weights"), tiny_llama, tmp_path / "whole")
    result = pipeline.run(recipe(asked, "encode_weights"), tiny_llama, tmp_path / "out")
    assert result.bytes_out <= 0.7 * whole.bytes_out
    [metrics, _] = [stage["metrics"] for stage in result.manifest["stages"]]
    share = 1 - result.bytes_out / whole.bytes_out
    assert metrics["budget"]["reached"] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("granularity", ["block", "attention"])
def test_a_share_that_may_not_go(
    granularity: str, measure: str, tiny_llama: Path, tmp_path: Path
) -> None:
    what = measure.replace("_", " ")
    with pytest.raises(
        BadInput,
        match=f"prune_blocks.budget: so large a share of the {what} cannot be removed, got 0.9, "
        r"expected at most 0\.\d+, what may go and leaves a block",
    ) as caught:
        prune(tiny_llama, tmp_path / "out", granularity=granularity, budget={measure: 0.9})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("granularity", ["block", "mlp", "joint"])
def test_a_budget_leaves_a_block_of_each_kind(
    granularity: str, tiny_llama: Path, tmp_path: Path
) -> None:
    model = load_float32(room.open(tiny_llama))
    units = find_units(model, granularity)
    costs, total = savings("parameters", model, room.open(tiny_llama), units, TEXT.length)
    kinds = KINDS[granularity]
    five = min(5 * costs[kind, 0] for kind in kinds) / total
    options = {"granularity": granularity, "protect": []}
    _, report = prune(tiny_llama, tmp_path / "out", **options, budget={"parameters": five - 1e-6})
    assert all(len(blocks) < 6 for blocks in report.metrics["removed"].values())
    with pytest.raises(BadInput, match="what may go and leaves a block"):
        prune(tiny_llama, tmp_path / "no", **options, budget={"parameters": five + 1e-6})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"drop": 4, "granularity": "mlp"}, "prune_blocks.drop: cannot remove 4 of 6 blocks"),
        ({"drop": 7, "granularity": "joint"}, "cannot remove 7 of 12 parts of 6 blocks, 3 of them"),
        ({"drop": 1, "protect": [6], "granularity": "mlp"}, "no such block to protect"),
        (
            {"drop": 1, "protect": list(range(6)), "granularity": "joint"},
            "cannot remove 1 of 12 parts of 6 blocks, 6 of them protected.* at most 0",
        ),
        (
            {"budget": {"flops": 0.1}, "protect": list(range(6)), "granularity": "attention"},
            "cannot remove 1 of 6 blocks, 6 of them protected",
        ),
        (
            {"drop": 1, "granularity": "attention", "scorer": "window_angular"},
            "windows are of whole blocks, got attention; granularity: block",
        ),
        (
            {"drop": 1, "granularity": "joint", "search": "iterative", "scorer": "random"},
            "'random' has no scores to take anew",
        ),
    ],
)
def test_plan_refuses(tiny_llama: Path, options: dict[str, object], complaint: str) -> None:
    config = STAGE.Config.model_validate(options)
    with pytest.raises(BadInput, match=complaint) as caught:
        STAGE.plan(room.open(tiny_llama), config, TEXT)
    assert "\n" not in str(caught.value)


def test_a_window_that_is_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no adjacent blocks may all go"):
        prune(tiny_llama, tmp_path / "out", drop=3, protect=[2, 3], scorer="window_angular")


def test_an_infinite_loss_is_null_in_the_report(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Block 4 takes back what block 1 adds: without it, the logits overflow."""
    make_llama(tmp_path / "model", mlp_bias=True, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for block, added in ((1, 100), (4, -100)):
            model.model.layers[block].mlp.down_proj.bias[0] = added
        model.model.norm.weight[0] = 5
        model.lm_head.weight[0, 0] = 1e37
    model.save_pretrained(tmp_path / "model")
    options = {"drop": 1, "scorer": "last_k", "search": "best_scorer"}
    _, report = prune(tmp_path / "model", tmp_path / "out", **options)
    metrics = json.loads(report.model_dump_json())["metrics"]
    json.dumps(report.metrics, allow_nan=False)
    assert metrics["candidates"][-1] == {"rule": "last_k", "removed": {"block": [4]}, "kl": None}
    assert metrics["search"]["one_shot_kl"] is None
    assert metrics["search"]["found_kl"] >= 0
    assert metrics["search"]["kept"] == "found"
    assert metrics["removed"]["block"] in ([2], [3])


class Killed(Exception):
    pass


class Mortal(Silent):
    """Dies when the n-th step of that label begins; counts them."""

    def __init__(self, label: str, dies: int | None = None) -> None:
        self.label, self.dies, self.begun = label, dies, 0

    @contextmanager
    def step(self, label: str, total: int, unit: str = "B") -> Iterator[Step]:
        if label.startswith(self.label):
            if self.begun == self.dies:
                raise Killed
            self.begun += 1
        yield self


@pytest.mark.parametrize(
    ("search", "granularity"),
    [
        ("evolutionary", "block"),
        ("greedy", "joint"),
        pytest.param("evolutionary", "joint", marks=pytest.mark.slow),
        pytest.param("greedy", "block", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_search_goes_on_to_the_same_bytes(
    search: str,
    granularity: str,
    tiny_llama: Path,
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    options = {"drop": 2, "search": search, "evolution": EVOLUTION, "protect": [0]}
    asked = recipe({"prune_blocks": {**options, "granularity": granularity}}, "encode_weights")
    whole, out = Mortal("trying"), tmp_path / "out"
    pipeline.run(asked, tiny_llama, tmp_path / "whole", progress=whole)
    for resume in (False, True):
        with pytest.raises(Killed):
            pipeline.run(asked, tiny_llama, out, resume=resume, progress=Mortal("trying", 1))
        assert not out.exists()
        [scratch] = workspace_path(out).glob("*.scratch")
        assert (scratch / "kl.json").is_file()
    rest = Mortal("trying")
    pipeline.run(asked, tiny_llama, out, resume=True, progress=rest)
    assert rest.begun < whole.begun
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert not [name for name in contents(out) if "kl.json" in name]


def test_the_scratch_is_gone_when_the_stage_is_done(tiny_llama: Path, tmp_path: Path) -> None:
    asked = recipe({"prune_blocks": {"drop": 1, "search": "greedy"}}, "encode_weights")
    out = tmp_path / "out"
    with pytest.raises(Killed):  # at the stage that follows
        pipeline.run(asked, tiny_llama, out, progress=Mortal("encoding", 0))
    assert not list(workspace_path(out).glob("00-*.scratch"))
    assert len(list(workspace_path(out).glob("00-*.json"))) == 1
    measured = Mortal("trying")
    pipeline.run(asked, tiny_llama, out, resume=True, progress=measured)
    assert measured.begun == 0
    assert not workspace_path(out).exists()


def test_the_journal_of_another_recipe_is_not_taken_up(
    tiny_llama: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    def asked(drop: int) -> recipes.Recipe:
        return recipe({"prune_blocks": {"drop": drop, "search": "greedy"}})

    out = tmp_path / "out"
    pipeline.run(asked(2), tiny_llama, tmp_path / "whole")
    with pytest.raises(Killed):
        pipeline.run(asked(3), tiny_llama, out, progress=Mortal("trying", 1))
    pipeline.run(asked(2), tiny_llama, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
