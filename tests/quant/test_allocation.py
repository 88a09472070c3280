from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from compress.errors import BadInput
from compress.quant.allocation import GRID, Curve, allocate, measure_curve
from compress.quant.ecsq import quantize_ecsq
from compress.quant.fitting import fit_rate
from compress.quant.rate import Rate, sqnr


def normal(rows: int, columns: int, seed: int = 0, size: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = size * (0.3 * torch.randn(rows, 1, generator=generator)).exp()
    return torch.randn(rows, columns, generator=generator) * spread


MATRICES = {
    "a": normal(300, 256, 1),
    "b": normal(128, 512, 2, 0.1).bfloat16(),
    "c": normal(64, 700, 3, 0.5).pow(3),  # heavy tails
    "d": normal(200, 96, 4, 2.0),
}


def curves(**options: float) -> dict[str, Curve]:
    return {
        name: measure_curve(w, torch.bfloat16, name=name, **options) for name, w in MATRICES.items()
    }


def exact(c: dict[str, float], rdo: float = 0.0) -> Rate:
    rates = (
        quantize_ecsq(MATRICES[name], value, torch.bfloat16, rdo=rdo).rate()
        for name, value in c.items()
    )
    return sum(rates, Rate())


def test_a_curve_is_the_rate_of_the_whole_matrix() -> None:
    w = normal(3000, 400)  # more than the sample
    curve = measure_curve(w, torch.float16, name="w")
    assert curve.weights == w.numel()
    spread = w.std(1, correction=0).square().mean().sqrt()
    assert curve.spread == pytest.approx(float(spread), rel=0.05)
    for c in (0.1, 0.31, 0.5, 1.0):
        rate = quantize_ecsq(w, c, torch.float16).rate()
        assert curve.at(c) == pytest.approx(rate.bits_per_weight, abs=0.03)
    assert sorted(curve.bits, reverse=True) == list(curve.bits)


def test_the_sample_is_chosen_by_seed_and_name() -> None:
    w = normal(3000, 400)
    one = measure_curve(w, torch.float16, name="w")
    random.seed(7)
    torch.manual_seed(7)
    assert measure_curve(w, torch.float16, name="w") == one
    assert measure_curve(w, torch.float16, name="w", seed=1) != one
    assert measure_curve(w, torch.float16, name="v") != one


@pytest.mark.parametrize("target", [1.6, 2.5, 3.8, 5.0])
def test_without_sensitivities_all_get_one_c(target: float) -> None:
    c = allocate(curves(), target)
    assert len(set(c.values())) == 1
    assert exact(c).bits_per_weight == pytest.approx(target, abs=0.05)


def test_of_all_steps_within_the_target_the_finest_are_taken() -> None:
    found, c = curves(), allocate(curves(), 3.8)
    bits = sum(found[name].at(0.999 * c[name]) * found[name].weights for name in found)
    assert bits > 3.8 * sum(curve.weights for curve in found.values())


def test_steps_go_with_the_root_of_the_sensitivity() -> None:
    sensitivities = {"a": 1.0, "b": 4.0, "c": 0.25, "d": 0.01}
    found = curves()
    c = allocate(found, 3.8, sensitivities)
    steps = {name: c[name] * found[name].spread for name in found}
    roots = {name: steps[name] * math.sqrt(sensitivities[name]) for name in found}
    assert max(roots.values()) == pytest.approx(min(roots.values()), rel=1e-6)
    assert exact(c).bits_per_weight == pytest.approx(3.8, abs=0.05)


def test_sensitivities_lower_the_distortion_that_they_weigh() -> None:
    sensitivities = {"a": 9.0, "b": 0.5, "c": 0.02, "d": 0.3}

    def distortion(c: dict[str, float]) -> float:
        total = 0.0
        for name, value in c.items():
            w = MATRICES[name].float()
            dense = quantize_ecsq(w, value, torch.float32).dense(torch.float32)
            total += sensitivities[name] * float((dense - w).square().sum())
        return total

    blind, seeing = allocate(curves(), 3.8), allocate(curves(), 3.8, sensitivities)
    assert exact(seeing).bits_per_weight == pytest.approx(exact(blind).bits_per_weight, abs=0.03)
    assert distortion(seeing) < 0.7 * distortion(blind)


def test_equal_slopes_are_the_best_exchange() -> None:
    """To give bits from any matrix to any other raises the weighted distortion of theory."""
    found, sensitivities = curves(), {"a": 1.0, "b": 4.0, "c": 0.25, "d": 0.01}
    c = allocate(found, 4.5, sensitivities)

    def cost(name: str, shift: float) -> float:
        step = c[name] * found[name].spread * 2**-shift
        return found[name].weights * sensitivities[name] * step**2 / 12

    for giver in c:
        for taker in c:
            bits = 0.05 * found[giver].weights / found[taker].weights
            now = cost(giver, 0) + cost(taker, 0)
            assert giver == taker or cost(giver, -0.05) + cost(taker, bits) > now


def test_a_target_below_the_least_is_refused_by_number() -> None:
    with pytest.raises(BadInput, match=r"bits_per_weight.*got 0\.9, expected 1\.\d+ or more") as no:
        allocate(curves(), 0.9)
    least = float(str(no.value).split("expected ")[1].split()[0])
    assert max(allocate(curves(), least).values()) <= GRID[-1]
    with pytest.raises(BadInput):
        allocate(curves(), least - 0.002)


def test_a_generous_target_gives_the_finest_steps() -> None:
    assert set(allocate(curves(), 9.0).values()) == {GRID[0]}
    sensitivities = {"a": 1.0, "b": 4.0, "c": 0.25, "d": 0.0}
    c = allocate(curves(), 9.0, sensitivities)
    assert [c[name] for name in "abcd"] == [*[GRID[0]] * 3, GRID[-1]]


def test_steps_go_with_their_factors() -> None:
    found = curves()
    c = allocate(found, 3.8, factors={"a": 2.0, "c": 0.5, "of another model": 7.0})
    assert c["a"] / 2 == pytest.approx(c["c"] * 2) == pytest.approx(c["b"])
    assert c["b"] == c["d"]  # 1 where nothing is said
    assert exact(c).bits_per_weight == pytest.approx(3.8, abs=0.05)
    assert allocate(found, 3.8, factors={}) == allocate(found, 3.8)


def test_what_is_dropped_leaves_its_bits_to_the_others() -> None:
    found = curves()
    c = allocate(found, 3.0, factors={"d": 0.5}, dropped=["b"])
    assert list(c) == ["a", "c", "d"]
    bits = sum(found[name].at(c[name]) * found[name].weights for name in c)
    assert bits == pytest.approx(3.0 * sum(curve.weights for curve in found.values()), rel=1e-4)
    assert allocate(found, 3.0, dropped=["b"])["a"] < allocate(found, 3.0)["a"]
    assert allocate(found, 0.9, dropped=["a", "b"])["c"] <= GRID[-1]  # else below the least


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf, 0.0])
def test_factors_must_be_positive_numbers(bad: float) -> None:
    with pytest.raises(BadInput, match="^c: no factor of a step"):
        allocate(curves(), 3.8, factors={"c": bad})
    with pytest.raises(ValueError, match="not by both"):
        allocate(curves(), 3.8, dict.fromkeys("abcd", 1.0), factors={})


@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf, None])
def test_sensitivities_must_be_numbers(bad: float | None) -> None:
    sensitivities = dict.fromkeys("abcd", 1.0)
    del sensitivities["c"]
    with pytest.raises(BadInput, match="^c: "):
        allocate(curves(), 3.8, sensitivities if bad is None else sensitivities | {"c": bad})


def reader(read: list[str]) -> Callable[[str], torch.Tensor]:
    def give(name: str) -> torch.Tensor:
        read.append(name)
        return MATRICES[name]

    return give


@pytest.mark.parametrize("rdo", [0.0, 0.1])
@pytest.mark.parametrize(("target", "less"), [(1.3, 0.1), (2.0, 0.011), (3.8, 0.011), (6.0, 0.011)])
def test_fitted_matrices_take_at_most_the_target_and_hardly_less(
    target: float, less: float, rdo: float
) -> None:
    """Near 1 bit a Huffman code jumps: one rare code more makes a frequent one a bit longer."""
    read: list[str] = []
    fitted = fit_rate(reader(read), list(MATRICES), target, torch.bfloat16, rdo=rdo)
    assert fitted.total == exact(dict(fitted.c), rdo)
    assert target - less <= fitted.total.bits_per_weight <= target
    assert target < 2 or len(read) <= 4 * len(MATRICES)
    assert list(fitted.c) == list(MATRICES)


def test_fine_matrices_count_and_are_kept_at_eight_bits() -> None:
    fitted = fit_rate(
        MATRICES.__getitem__,
        list(MATRICES),
        3.8,
        torch.bfloat16,
        fine=["b"],
        sensitivities={"a": 1.0, "c": 0.25, "d": 0.01},
    )
    assert fitted.c["b"] == 0
    assert fitted.rates["b"].bits_per_weight > 6
    assert sqnr(MATRICES["b"], quantize_ecsq(MATRICES["b"], 0, torch.bfloat16)) > 38
    assert 3.78 < fitted.total.bits_per_weight <= 3.8
    assert fitted.total == exact(dict(fitted.c))


def test_fitted_factors_meet_the_target_with_what_is_dropped_in_it() -> None:
    fitted = fit_rate(
        MATRICES.__getitem__,
        list(MATRICES),
        3.0,
        torch.bfloat16,
        factors={"a": 0.5},
        dropped=["b", "c"],
        fine=["c"],
    )
    assert [fitted.c["b"], fitted.c["c"]] == [math.inf] * 2
    assert fitted.rates["b"] == Rate(MATRICES["b"].numel())
    assert fitted.c["a"] == pytest.approx(fitted.c["d"] / 2)
    assert 2.98 < fitted.total.bits_per_weight <= 3.0
    assert fitted.total.weights == sum(w.numel() for w in MATRICES.values())
    assert fitted.total.bits == exact({name: fitted.c[name] for name in "ad"}).bits
    assert list(fitted.c) == list(MATRICES)
    with pytest.raises(ValueError, match="not by both"):
        fit_rate(
            MATRICES.__getitem__,
            list(MATRICES),
            3.0,
            torch.bfloat16,
            sensitivities=dict.fromkeys(MATRICES, 1.0),
            factors={},
        )


def test_a_target_that_the_fine_ones_alone_exceed_is_refused() -> None:
    with pytest.raises(BadInput, match=r"bits_per_weight.*got 2\.0, expected"):
        fit_rate(MATRICES.__getitem__, list(MATRICES), 2.0, torch.bfloat16, fine=["a", "b"])


def test_a_generous_target_is_met_in_one_count() -> None:
    read: list[str] = []
    fitted = fit_rate(reader(read), list(MATRICES), 9.0, torch.bfloat16)
    assert set(fitted.c.values()) == {GRID[0]}
    assert read == 2 * list(MATRICES)


def test_a_matrix_that_cannot_be_quantized_is_named() -> None:
    broken = MATRICES | {"c": torch.full((4, 4), math.nan)}
    with pytest.raises(BadInput, match="^c, row 0: holds NaN"):
        fit_rate(broken.__getitem__, list(broken), 3.8, torch.bfloat16)
