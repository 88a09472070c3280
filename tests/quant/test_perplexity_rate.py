"""The least rate that a perplexity allows, found by trials that a journal keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint import dump_json, load_object
from compress.errors import BadInput, Corrupt
from compress.progress import Silent
from compress.quant.activations import quantized_inputs
from compress.quant.allocation import GRID
from compress.quant.ecsq import quantize_ecsq
from compress.quant.fitting import fit_rate
from compress.quant.perplexity_rate import TOLERANCE, RateFound, rate_for_perplexity
from compress.quant.quantized_perplexity import QuantizedPerplexity

RATIO = 1.1
SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}


class Case:
    """A random model, its weights as they are stored, and text of its own making."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            **SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
        self.model: Any = LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
        self.stored = {
            name: value.detach().bfloat16().clone() for name, value in self.model.named_parameters()
        }
        self.names = [name for name in self.stored if "_proj" in name]
        self.tokens = torch.arange(4)[:, None]
        with torch.inference_mode():
            for _ in range(59):
                chances = self.model(self.tokens).logits[:, -1].softmax(1)
                self.tokens = torch.cat([self.tokens, chances.multinomial(1)], 1)
        self.tokens = self.tokens.clone()

    def find(self, max_ratio: float = RATIO, **options: Any) -> RateFound:
        arguments = {"tokens": self.tokens, "names": self.names, **options}
        read = arguments.pop("read", self.stored.__getitem__)
        return rate_for_perplexity(
            self.model,
            read,
            max_ratio=max_ratio,
            scale_dtype=torch.bfloat16,
            **arguments,
        )

    def perplexity(self) -> float:
        with torch.no_grad():
            chances = self.model(self.tokens).logits[:, :-1].double().log_softmax(2)
        return math.exp(-chances.gather(2, self.tokens[:, 1:, None]).mean())

    def unchanged(self) -> bool:
        return all(
            value.equal(self.stored[name].float()) for name, value in self.model.named_parameters()
        ) and not any(module._forward_pre_hooks for module in self.model.modules())


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def found(case: Case) -> RateFound:
    return case.find()


class Killed(Exception):
    pass


class Trials(Silent):
    """Progress that counts trials, and interrupts a search after so many."""

    def __init__(self, most: int = 99) -> None:
        self.made, self._most = 0, most

    def note(self, line: str) -> None:
        if self.made == self._most:
            raise Killed
        self.made += 1


@pytest.mark.parametrize("activations", [None, 4])
def test_the_ratio_is_that_of_the_model_with_the_weights_that_were_found(
    activations: int | None, case: Case, found: RateFound
) -> None:
    if activations:
        other = case.find(2.0, activations=activations)
        assert [trial.ratio for trial in other.trials] != [trial.ratio for trial in found.trials]
        found = other
    own = case.perplexity()
    parameters = dict(case.model.named_parameters())
    try:
        for name, c in found.allocation.c.items():
            quantized = quantize_ecsq(case.stored[name], c, torch.bfloat16)
            assert quantized.rate() == found.allocation.rates[name]
            parameters[name].data.copy_(quantized.dense(torch.bfloat16))
        with quantized_inputs(case.model, case.names if activations else [], activations or 8):
            ratio = case.perplexity() / own
    finally:
        for name in found.allocation.c:
            parameters[name].data.copy_(case.stored[name])
    assert ratio == pytest.approx(found.ratio, rel=1e-5)
    assert ratio < (2.0 if activations else RATIO)


def test_a_little_less_is_too_little(case: Case, found: RateFound) -> None:
    bits = found.allocation.total.bits_per_weight
    [own] = [trial for trial in found.trials if trial.bits_per_weight == bits]
    assert own.ratio == found.ratio <= RATIO
    below = [trial for trial in found.trials if bits - TOLERANCE - 0.01 < trial.bits_per_weight]
    assert any(trial.ratio > RATIO for trial in below if trial.bits_per_weight < bits)
    assert len(found.trials) <= 8
    assert list(found.allocation.c) == case.names


@pytest.mark.slow
def test_more_is_allowed_at_less_bits(case: Case, found: RateFound) -> None:
    strict, lax = case.find(1.01), case.find(2.0)
    bits = [each.allocation.total.bits_per_weight for each in (strict, found, lax)]
    assert bits[0] > 6.25  # between the rungs and the finest
    assert bits[0] > bits[1] > 4 > bits[2]


@pytest.mark.parametrize("rdo", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_where_all_is_allowed_the_least_that_the_format_takes_is_found(
    rdo: float, case: Case
) -> None:
    fine = case.names[3]
    result = case.find(1e6, fine=[fine], rdo=rdo)
    assert result.allocation.c == {name: 0 if name == fine else GRID[-1] for name in case.names}
    for name, rate in result.allocation.rates.items():
        c = result.allocation.c[name]
        assert quantize_ecsq(case.stored[name], c, torch.bfloat16, rdo=rdo).rate() == rate
    assert min(trial.bits_per_weight for trial in result.trials) == (
        result.allocation.total.bits_per_weight
    )


def test_from_a_high_least_the_search_goes_up(case: Case) -> None:
    """With all but one at 8 bits the least is above where searches start."""
    result = case.find(1.03, fine=case.names[1:])
    least = case.find(1e6, fine=case.names[1:])
    assert len(least.trials) == 1
    assert least.allocation.total.bits_per_weight > 4
    assert result.trials[0] == least.trials[0]
    assert result.ratio <= 1.03


@pytest.mark.slow
def test_targets_that_cannot_be_fitted_are_met_by_the_least(case: Case) -> None:
    """Matrices that are all zeros cost nothing, those that are nearly so a bit a weight."""
    options: dict[str, Any] = {"fine": case.names[:1], "rdo": 0.8}
    with pytest.raises(BadInput, match="so few bits per weight cannot be reached"):
        fit_rate(case.stored.__getitem__, case.names, 2.5, torch.bfloat16, **options)
    result = case.find(1e6, **options)
    assert result.allocation.total.bits_per_weight < 1.5
    bits = case.find(min(trial.ratio for trial in result.trials) - 0.01, **options)
    assert 2.5 < bits.allocation.total.bits_per_weight <= 6.25


def test_sensitivities_are_those_of_the_fit(case: Case) -> None:
    sensitivities = {name: 4.0**index for index, name in enumerate(case.names)}
    result = case.find(2.0, sensitivities=sensitivities)
    assert len(set(result.allocation.c.values())) > 4
    with pytest.raises(BadInput, match="no sensitivity that is a number"):
        case.find(sensitivities=dict.fromkeys(case.names, math.nan))


def test_the_weights_are_as_before(case: Case, found: RateFound) -> None:
    assert case.unchanged()
    for most in (0, 2):
        with pytest.raises(Killed):
            case.find(activations=8, progress=Trials(most))
        assert case.unchanged()


def test_the_result_depends_on_no_number_of_threads(case: Case, found: RateFound) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert case.find() == found
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("most", [0, 1, 4])
def test_an_interrupted_search_goes_on_to_the_same_result(
    most: int, case: Case, found: RateFound, tmp_path: Path
) -> None:
    journal = tmp_path / "trials.json"
    with pytest.raises(Killed):
        case.find(journal=journal, progress=Trials(most))
    rest = Trials()
    assert case.find(journal=journal, progress=rest) == found
    assert rest.made == len(found.trials) - most
    none = Trials(0)
    assert case.find(journal=journal, progress=none) == found
    assert case.unchanged()


def test_trials_are_good_for_another_ratio(case: Case, found: RateFound, tmp_path: Path) -> None:
    journal = tmp_path / "trials.json"
    case.find(2.0, journal=journal)
    count = Trials()
    assert case.find(journal=journal, progress=count) == found
    assert count.made < len(found.trials)


def test_a_journal_of_another_search_or_damaged(case: Case, tmp_path: Path) -> None:
    journal = tmp_path / "trials.json"
    case.find(1e6, journal=journal, subject="a")
    changes: list[dict[str, Any]] = [
        {"subject": "b"},
        {"tokens": case.tokens.flip(0)},
        {"names": case.names[1:]},
        {"seed": 1},
        {"rdo": 0.1},
        {"fine": case.names[:1]},
        {"activations": 8},
        {"sensitivities": dict.fromkeys(case.names, 1.0)},
    ]
    for change in changes:
        with pytest.raises(BadInput, match="the journal is that of another search"):
            case.find(**{"journal": journal, "subject": "a", **change})
    document = load_object(journal)
    for broken in (b"{", dump_json({**document, "trials": [{"target": "4"}]}), b"[]"):
        journal.write_bytes(broken)
        with pytest.raises(Corrupt, match=r"trials.json: not the journal of a search"):
            case.find(journal=journal, subject="a")


@pytest.mark.parametrize("ratio", [1.0, 0.5, -1.0, math.nan, math.inf])
def test_ratios_that_cannot_be(ratio: float, case: Case) -> None:
    with pytest.raises(BadInput, match="max_perplexity_ratio: must be a finite number above 1"):
        case.find(ratio)


@pytest.mark.slow
def test_what_even_eight_bits_do_not_reach_is_refused_by_number(case: Case) -> None:
    with pytest.raises(BadInput, match=r"even 8 bits .* got 1\.001, expected more than the") as no:
        case.find(1.001, activations=4)
    reached = float(str(no.value).split("the ")[2].split()[0])
    assert reached > 1.001
    assert case.find(reached + 1e-4, activations=4).ratio <= reached + 1e-4
    assert case.unchanged()


def test_weights_that_compute_nan_are_infinitely_bad(case: Case) -> None:
    name = case.names[0]
    perplexity = QuantizedPerplexity(case.model, case.stored.__getitem__, [name], case.tokens)
    bad: list[Callable[[str], torch.Tensor]] = [
        lambda name: torch.full_like(case.stored[name], math.nan),
        lambda name: torch.full_like(case.stored[name], math.inf),
    ]
    with perplexity.restored():
        assert perplexity.ratio(case.stored.__getitem__, None, "itself") == 1
        assert [perplexity.ratio(dense, None, "broken") for dense in bad] == [math.inf, math.inf]
    assert case.unchanged()


def test_a_model_that_computes_nan_itself_is_refused() -> None:
    broken = Case()
    broken.model.lm_head.weight.data[3, 5] = math.nan
    with pytest.raises(BadInput, match="the model's logits are not finite"):
        broken.find()


def test_what_is_no_weight_of_a_linear_layer_or_no_text(case: Case) -> None:
    with pytest.raises(BadInput, match=r"q_prj.*did you mean"):
        case.find(names=[case.names[0].replace("q_proj", "q_prj")])
    with pytest.raises(BadInput, match="windows of this length cannot be measured"):
        case.find(tokens=case.tokens[:, :5])
