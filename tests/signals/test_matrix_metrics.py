from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.signals.matrix_entropy import matrix_entropy
from compress.signals.nuclear_norm import nuclear_norm


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def literal_unit(x: torch.Tensor) -> list[list[float]]:
    """Each token less the mean token, divided by its length."""
    rows = x.double().tolist()
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]
    return [[value / math.hypot(*row) for value in row] for row in centred]


def literal_matrix_entropy(x: torch.Tensor) -> float:
    """The definition: eigenvalues of the d x d covariance of unit tokens, whose trace is made 1."""
    z = torch.tensor(literal_unit(x), dtype=torch.float64)
    covariance = sum(torch.outer(row, row) for row in z) / len(z)
    values = torch.linalg.eigvals(covariance / covariance.trace()).real.tolist()
    return -sum(value * math.log(value) for value in values if value > 1e-15) / math.log(x.shape[1])


def literal_nuclear_norm(x: torch.Tensor) -> float:
    columns = zip(*literal_unit(x), strict=True)
    norms = sorted((math.hypot(*column) for column in columns), reverse=True)
    return sum(norms[: min(x.shape)]) / len(x)


SHAPES = [(60, 8), (8, 60), (33, 33), (2, 5), (500, 2), (7, 3)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_matrix_entropy_is_the_formula(n: int, d: int) -> None:
    x = normal(n, d) * torch.linspace(0.1, 3, d) + 50
    assert matrix_entropy(x) == pytest.approx(literal_matrix_entropy(x), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_nuclear_norm_is_the_formula(n: int, d: int) -> None:
    x = normal(n, d) * torch.linspace(0.1, 3, d) + 50
    assert nuclear_norm(x) == pytest.approx(literal_nuclear_norm(x), rel=1e-9)


def test_tokens_in_every_direction_alike_reach_the_bounds() -> None:
    x = torch.cat([torch.eye(6), -torch.eye(6)])
    assert matrix_entropy(x) == pytest.approx(1)
    assert nuclear_norm(x) == pytest.approx(math.sqrt(6 / 12))


def test_tokens_on_a_line_have_no_entropy() -> None:
    x = torch.arange(9.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    assert matrix_entropy(x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("x", [torch.full((5, 3), 0.1), torch.ones(4, 1), torch.zeros(1, 4)])
def test_tokens_that_do_not_differ_have_none(x: torch.Tensor) -> None:
    assert matrix_entropy(x) == pytest.approx(0, abs=1e-9)
    assert nuclear_norm(x) == pytest.approx(0, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 99))
def test_bounds_and_what_changes_nothing(n: int, d: int, seed: int) -> None:
    x = normal(n, d, seed)
    entropy, norm = matrix_entropy(x), nuclear_norm(x)
    assert -1e-9 <= entropy <= math.log(max(min(n - 1, d), 1)) / math.log(d) + 1e-9
    assert 0 < norm <= math.sqrt(min(n, d) / n) + 1e-9
    turn = torch.linalg.qr(normal(d, d, seed + 1)).Q
    changed = x.flip(0) * 3 + 7
    assert matrix_entropy(changed) == pytest.approx(entropy, abs=1e-5)
    assert nuclear_norm(changed) == pytest.approx(norm, abs=1e-5)
    assert matrix_entropy(x @ turn) == pytest.approx(entropy, abs=1e-5)


def test_bfloat16_is_read_as_it_is() -> None:
    x = normal(20, 12).to(torch.bfloat16)
    assert matrix_entropy(x) == matrix_entropy(x.double())
    assert nuclear_norm(x) == nuclear_norm(x.double())
