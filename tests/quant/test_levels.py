"""Steps for each unit found by evolution, and units left out, at one rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import checkpoint
from compress.checkpoint import dump_json, load_object
from compress.errors import BadInput, Corrupt
from compress.quant.allocation import GRID, allocate, measure_curve
from compress.quant.ecsq import quantize_ecsq
from compress.quant.levels import Genome, LevelBudget, LevelLoss
from compress.quant.levels_search import Levels, LevelSearch, search_levels

TOKENS = torch.arange(4 * 50).view(4, 50) * 37 % 250
QUICK = LevelSearch(generations=3, offspring=5, survivors=(2, 1), tokens=(50, 100))
DTYPE = torch.bfloat16
BLOCKS = 3
UNIFORM: Genome = (0,) * (2 * BLOCKS)
TARGET = 3.0


class Killed(Exception):
    pass


class Setting:
    """A model in which MLP 1 is most of all, attention 2 does nearly nothing; counts reads."""

    def __init__(self, directory: Path) -> None:
        self.model = checkpoint.open(directory).load_model(dtype=torch.float32).eval()
        with torch.no_grad():
            self.layer(1).mlp.down_proj.weight *= 300
            self.layer(2).self_attn.o_proj.weight *= 1e-3
        self.weights = {n: w.detach().clone() for n, w in self.model.named_parameters()}
        self.units: dict[tuple[str, int], list[str]] = {}
        for name in self.weights:
            if "proj" in name:
                kind = "mlp" if "mlp" in name else "attention"
                self.units.setdefault((kind, int(name.split(".")[2])), []).append(name)
        self.reads: list[str] = []

    def layer(self, index: int) -> Any:
        return self.model.model.layers[index]

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.weights[name]

    def intact(self) -> bool:
        return all(torch.equal(w, self.weights[n]) for n, w in self.model.named_parameters())

    def search(self, asked: LevelSearch = QUICK, tokens: Any = TOKENS, **options: Any) -> Levels:
        target = options.pop("target", TARGET)
        fixed = options.pop("fixed", ["lm_head.weight"])
        options = {"scale_dtype": DTYPE, **options}
        return search_levels(
            self.model, self.read, self.units, fixed, target, tokens, asked, **options
        )

    def budget(self, **options: Any) -> LevelBudget:
        names = [*(name for group in self.units.values() for name in group), "lm_head.weight"]
        curves = {n: measure_curve(self.weights[n], DTYPE, name=n) for n in names}
        options = {"target": TARGET, "step": 0.25, **options}
        return LevelBudget({u: self.units[u] for u in sorted(self.units)}, curves, **options)


@pytest.fixture(scope="module")
def small(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "small"
    return make_llama(directory, num_hidden_layers=BLOCKS, tie_word_embeddings=False)


@pytest.fixture
def setting(small: Path) -> Setting:
    return Setting(small)


def divergence(one: Any, other: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (model(input_ids=tokens).logits.double().log_softmax(-1) for model in (one, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_search_gets_better_and_tells_what_it_measured(setting: Setting, small: Path) -> None:
    found = setting.search(replace(QUICK, generations=5), droppable=setting.units)
    assert list(found.history) == sorted(found.history, reverse=True)
    assert len(found.history) == 6
    assert found.loss == found.history[-1] < 0.9 * found.start_loss
    assert found.history[0] <= found.start_loss
    assert found.factors["lm_head.weight"] == 1
    gone = {name for unit in found.dropped for name in setting.units[unit]}
    assert gone.isdisjoint(found.factors)
    assert gone | set(found.factors) == {n for n in setting.weights if "proj" in n or "lm" in n}

    def loss(factors: dict[str, float] | None, dropped: set[str]) -> float:
        c = allocate(setting.budget().curves, TARGET, factors=factors, dropped=dropped)
        other = Setting(small).model
        for name, weight in other.named_parameters():
            if name in c:
                weight.data = quantize_ecsq(weight, c[name], DTYPE).dense(torch.float32)
            elif name in dropped:
                weight.data.zero_()
        return divergence(setting.model, other, TOKENS[:2])

    assert found.loss == pytest.approx(loss(found.factors, gone), rel=0.03)
    assert found.start_loss == pytest.approx(loss(None, set()), rel=0.03)


def test_the_model_gets_its_weights_back(setting: Setting) -> None:
    setting.search(droppable=setting.units)
    assert setting.intact()


def test_an_interruption_leaves_the_model_as_it_was(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def quantize(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 35:
            raise Killed
        return quantize_ecsq(*args, **options)

    monkeypatch.setattr("compress.quant.levels.quantize_ecsq", quantize)
    with pytest.raises(Killed):
        setting.search()
    assert setting.intact()


def test_the_seed_alone_decides(setting: Setting) -> None:
    short, options = replace(QUICK, generations=2), {"droppable": sorted(setting.units)}
    first = setting.search(short, **options)
    torch.manual_seed(5)
    assert setting.search(short, droppable=set(setting.units)) == first
    assert setting.search(replace(short, seed=1), **options).history != first.history


def test_a_unit_that_does_nothing_goes(setting: Setting) -> None:
    start = replace(QUICK, generations=0)
    idle = setting.search(start, droppable=[("attention", 2)])
    assert idle.dropped == (("attention", 2),)
    assert idle.loss < idle.start_loss
    assert setting.search(start, droppable=[("mlp", 1)]).dropped == ()
    none = replace(start, most_drops=0)
    assert setting.search(none, droppable=[("attention", 2)]).dropped == ()


def test_at_most_so_many_are_gone(setting: Setting) -> None:
    seen: list[int] = []
    call = LevelLoss.__call__

    def spied(self: LevelLoss, genomes: list[Genome], sequences: int) -> list[float]:
        seen.extend(genome.count(None) for genome in genomes)
        return call(self, genomes, sequences)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LevelLoss, "__call__", spied)
        setting.search(replace(QUICK, most_drops=2), droppable=setting.units)
    assert max(seen) == 2


def test_what_matters_gets_finer_steps(setting: Setting) -> None:
    found = setting.search(replace(QUICK, generations=8))
    mine = found.factors["model.layers.1.mlp.down_proj.weight"]
    assert mine < 1
    assert mine == min(found.factors.values())
    for names in setting.units.values():
        assert len({found.factors[name] for name in names}) == 1
        octaves = 4 * math.log2(found.factors[names[0]])
        assert octaves == pytest.approx(round(octaves))


def test_unseen_text_decides_whether_the_outcome_is_kept(setting: Setting) -> None:
    plain = setting.search(QUICK)
    assert plain.loss < plain.start_loss
    assert plain.kept
    verdicts = set()
    for seed in range(6):
        unseen = torch.randint(0, 320, (1, 64), generator=torch.Generator().manual_seed(seed))
        found = setting.search(QUICK, unseen=unseen)
        assert found.unseen is not None
        assert found.kept == (found.unseen[0] < found.unseen[1])
        assert found.history == plain.history
        same = set(found.factors.values()) == {1.0}
        assert same != found.kept
        assert found.kept == (found.factors == plain.factors)
        verdicts.add(found.kept)
    judged = setting.search(QUICK, unseen=TOKENS[:2])  # what it was searched on
    assert judged.kept
    assert judged.unseen == pytest.approx((plain.loss, plain.start_loss))
    assert setting.intact()


def test_a_search_begins_with_what_sensitivities_say(setting: Setting) -> None:
    names = [*(name for group in setting.units.values() for name in group), "lm_head.weight"]
    spread = {n: float(setting.weights[n].std(1).square().mean().sqrt()) for n in names}
    equal = {name: spread[name] ** -2 for name in names}  # by which all steps are as wide
    none = replace(QUICK, generations=0)
    even = setting.search(none, sensitivities=equal)
    factors = torch.tensor(list(even.factors.values()))
    assert torch.allclose(factors, factors[0], rtol=0.2)  # from some of the rows
    assert even.history == (even.start_loss,)
    wise = equal | {n: 16 * equal[n] for n in setting.units["mlp", 1]}  # 2 octaves
    found = setting.search(none, sensitivities=wise)
    assert found.start_loss < even.start_loss
    for name in setting.units["mlp", 1]:
        assert found.factors[name] == pytest.approx(even.factors[name] / 4)
    harmless = dict.fromkeys(names, 0.0)
    assert set(setting.search(none, sensitivities=harmless).factors.values()) == {1.0}
    more = setting.search(QUICK, sensitivities=wise)
    assert more.loss <= found.start_loss
    for unit, group in setting.units.items():
        offset = more.offsets[unit]
        assert offset is not None
        for name in group:
            assert more.factors[name] == pytest.approx(found.factors[name] * 2**offset)


def test_ties_keep_the_parent(setting: Setting) -> None:
    """With bits in plenty all steps are the finest there are."""
    found = setting.search(target=9.0)
    assert set(found.factors.values()) == {1.0}
    assert len(set(found.history)) == 1


def test_fine_matrices_stay_at_eight_bits(setting: Setting, small: Path) -> None:
    names = [name for group in setting.units.values() for name in group]
    found = setting.search(replace(QUICK, generations=0), fine=names, fixed=[], target=8.5)
    other = Setting(small).model
    for name, weight in other.named_parameters():
        if name in names:
            weight.data = quantize_ecsq(weight, 0, DTYPE).dense(torch.float32)
    assert found.loss == pytest.approx(divergence(setting.model, other, TOKENS[:2]), rel=0.01)
    budget = setting.budget(fine=setting.units["mlp", 1])
    c = budget.c(UNIFORM)
    assert [name for name, value in c.items() if value == 0] == setting.units["mlp", 1]
    gone = budget.c(tuple(None if unit == ("mlp", 1) else 0 for unit in budget.units))
    assert [name for name, value in gone.items() if math.isinf(value)] == setting.units["mlp", 1]


levels = st.none() | st.integers(-6, 6)
genomes = st.lists(levels, min_size=2 * BLOCKS, max_size=2 * BLOCKS)


@settings(max_examples=20, deadline=None)
@given(genomes, st.sampled_from([2.0, 3.0, 4.5]))
def test_every_genome_takes_the_same_bits(
    small: Path, genome: list[int | None], target: float
) -> None:
    budget = replace(_budget(small), target=target)
    c = budget.c(tuple(genome))
    gone = budget.dropped(tuple(genome))
    assert {name for name, value in c.items() if math.isinf(value)} == gone
    bits = sum(budget.curves[n].at(c[n]) * budget.curves[n].weights for n in c if n not in gone)
    share = bits / sum(curve.weights for curve in budget.curves.values())
    assert share <= target * (1 + 1e-9)
    assert share > target - 0.002 or min(c.values()) == GRID[0]


_BUDGETS: dict[Path, LevelBudget] = {}


def _budget(directory: Path) -> LevelBudget:
    if directory not in _BUDGETS:
        _BUDGETS[directory] = Setting(directory).budget()
    return _BUDGETS[directory]


def test_weights_whose_steps_stay_are_not_quantized_again(setting: Setting) -> None:
    budget = setting.budget(target=9.0)  # all have the finest steps
    loss = LevelLoss(setting.model, setting.read, budget, TOKENS, DTYPE)
    without: Genome = (None, *UNIFORM[1:])
    [uniform] = loss([UNIFORM], 1)
    assert setting.reads == list(budget.curves)
    setting.reads.clear()
    [dropped] = loss([without], 1)
    assert setting.reads == []
    [again] = loss([UNIFORM], 2)
    assert setting.reads == setting.units["attention", 0]
    loss.restore()
    assert setting.intact()
    fresh = LevelLoss(setting.model, setting.read, budget, TOKENS, DTYPE)
    assert fresh([without, UNIFORM], 1) == [dropped, uniform]
    assert fresh([UNIFORM], 2) == [again]


def test_no_sequence_is_measured_twice(setting: Setting) -> None:
    runs = 0
    setting.model.register_forward_hook(lambda *_: counted())

    def counted() -> None:
        nonlocal runs
        runs += 1

    loss = LevelLoss(setting.model, setting.read, setting.budget(), TOKENS, DTYPE)
    uniform: Genome = UNIFORM
    [few] = loss([uniform], 1)
    assert runs == 4 + 1  # the full model's, then one
    [many, again] = loss([uniform, uniform], 4)
    assert runs == 4 + 4
    assert loss([uniform], 1) == [few] != [many]
    assert many == again
    assert runs == 8


def test_a_search_killed_anywhere_ends_as_an_undisturbed_one(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = replace(QUICK, generations=2, offspring=3, survivors=(1, 1), tokens=(50, 100))
    options: dict[str, Any] = {"droppable": setting.units, "subject": "the model"}
    whole = tmp_path / "whole.json"
    expected = setting.search(quick, journal=whole, **options)
    assert expected == setting.search(quick, **options)
    calls, dies = 0, 0

    def quantize(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == dies:
            raise Killed
        return quantize_ecsq(*args, **kwargs)

    monkeypatch.setattr("compress.quant.levels.quantize_ecsq", quantize)
    for dies in (1, 30, 120):
        calls, journal = 0, tmp_path / f"{dies}.json"
        with pytest.raises(Killed):
            setting.search(quick, journal=journal, **options)
        assert journal.exists() == (dies > 22)
        before = calls
        assert setting.search(quick, journal=journal, **options) == expected
        assert journal.read_bytes() == whole.read_bytes()
        assert calls > before
    dies, calls = 1, 0
    assert setting.search(quick, journal=whole, **options) == expected
    assert not calls
    assert setting.intact()


def test_the_journal_of_another_search_is_refused(setting: Setting, tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    quick = replace(QUICK, generations=0)
    setting.search(quick, journal=journal, subject="model a")
    before = journal.read_bytes()
    others: list[dict[str, Any]] = [
        {"subject": "model b"},
        {"target": 3.1},
        {"tokens": TOKENS + 1},
        {"fixed": []},
        {"scale_dtype": torch.float16},
        {"fine": ["lm_head.weight"]},
    ]
    for other in others:
        with pytest.raises(BadInput, match=r"journal.json: .*of another search, .*; remove"):
            setting.search(quick, **{"journal": journal, "subject": "model a", **other})
    assert journal.read_bytes() == before
    longer = replace(quick, generations=1, offspring=2)  # goes on from what is known
    assert setting.search(longer, journal=journal, subject="model a") == setting.search(longer)


@pytest.mark.parametrize(
    "losses", [None, 3, [1], [{"levels": [0]}], [{"levels": [[]], "losses": []}], [{"losses": []}]]
)
def test_a_damaged_journal(setting: Setting, losses: object, tmp_path: Path) -> None:
    journal = tmp_path / "journal.json"
    budget = setting.budget()
    LevelLoss(setting.model, setting.read, budget, TOKENS, DTYPE, journal, "m")([UNIFORM], 1)
    journal.write_bytes(dump_json({**load_object(journal), "losses": losses}))
    with pytest.raises(Corrupt, match=r"journal.json: not the journal of a search"):
        LevelLoss(setting.model, setting.read, budget, TOKENS, DTYPE, journal, "m")


def test_losses_that_are_no_numbers(setting: Setting, tmp_path: Path) -> None:
    """What overflows is worth nothing, also after it went through a journal."""
    journal = tmp_path / "journal.json"
    budget = setting.budget()

    def broken(name: str) -> torch.Tensor:
        return (
            torch.full_like(setting.weights[name], 3e38)
            if "up_proj" in name
            else setting.read(name)
        )

    for _ in range(2):
        loss = LevelLoss(setting.model, broken, budget, TOKENS, torch.float32, journal, "m")
        assert loss([UNIFORM], 1) == [math.inf]


def test_a_model_that_computes_nan_is_refused(setting: Setting) -> None:
    with torch.no_grad():
        setting.model.model.norm.weight[0] = math.nan
    with pytest.raises(BadInput, match="logits are not finite"):
        setting.search()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"droppable": [("mlp", 9)]}, "may be dropped but is no unit, got mlp 9"),
        ({"target": 0.3}, "bits_per_weight: .*got 0.3, expected"),
        ({"fixed": ["model.embed_tokens.weight"]}, "embed_tokens.weight: is not the weight of a"),
        ({"tokens": TOKENS[0]}, "tokens are not in sequences"),
    ],
)
def test_what_cannot_be_searched(setting: Setting, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        setting.search(**options)
    assert setting.intact()


@pytest.mark.parametrize(
    "options",
    [
        {"mutations": 0},
        {"step": 0.0},
        {"step": math.nan},
        {"most_drops": -1},
        {"generations": -1},
        {"survivors": (2, 2)},
        {"survivors": (9, 1)},
        {"tokens": (1024, 256)},
    ],
)
def test_numbers_that_make_no_search(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        LevelSearch(**options)
