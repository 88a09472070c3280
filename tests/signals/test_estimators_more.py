from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.signals.angular import angular_distance
from compress.signals.attention_entropy import attention_entropy
from compress.signals.diffusion import diffusion_entropy
from compress.signals.effective_rank import effective_rank
from compress.signals.gaussian import gaussian_entropy
from compress.signals.matrix_entropy import matrix_entropy
from compress.signals.pq_index import pq_index
from compress.signals.prediction import next_token_entropy
from compress.signals.renyi import renyi_kernel_entropy, renyi_matrix_entropy
from compress.signals.truncated import truncated_matrix_entropy

SHAPES = [(60, 8), (8, 60), (33, 33), (3, 5), (50, 2)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(n: int, d: int) -> torch.Tensor:
    """Features of other scales, far from the origin."""
    return normal(n, d) * torch.linspace(0.1, 3, d) + 50


def shannon(shares: list[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 1e-15)


def literal_kernel(points: list[list[float]]) -> list[list[float]]:
    """The Gaussian kernel whose width is the (lower) median of all distances, pair by pair."""
    distances = [[math.dist(a, b) for b in points] for a in points]
    every = sorted(distance for row in distances for distance in row)
    width = every[(len(every) - 1) // 2]
    return [[math.exp(-(r**2) / (2 * width**2)) for r in row] for row in distances]


def literal_renyi(x: torch.Tensor, alpha: float) -> float:
    x = x.double()
    kernel = literal_kernel(((x - x.mean(0)) / x.std(0)).tolist())
    powers = [value ** (alpha - 1) for row in kernel for value in row]
    return math.log(math.fsum(powers) / len(powers)) / (1 - alpha)


def literal_spectrum(x: torch.Tensor) -> list[float]:
    """Eigenvalue shares, largest first, of the d x d covariance of centred unit tokens."""
    x = x.double()
    rows = [row / row.norm() for row in x - x.mean(0)]
    covariance = sum(torch.outer(row, row) for row in rows)
    values = torch.linalg.eigvals(covariance / covariance.trace()).real
    return sorted(values.tolist(), reverse=True)


def literal_diffusion(x: torch.Tensor, t: float) -> float:
    """Of the eigenvalues of the random walk itself, which is not symmetric."""
    kernel = torch.tensor(literal_kernel(x.double().tolist()), dtype=torch.float64)
    walk = kernel / kernel.sum(1, keepdim=True)
    powers = [abs(value) ** t for value in torch.linalg.eigvals(walk).real.tolist()]
    return shannon([power / sum(powers) for power in powers])


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_all_are_their_formulas(n: int, d: int) -> None:
    x = skewed(n, d)
    close = pytest.approx
    variances = [sum((v - f.mean()) ** 2 for v in f).item() / n for f in x.double().T]
    gaussian = sum(math.log(2 * math.pi * math.e * variance) / 2 for variance in variances)
    assert gaussian_entropy(x) == close(gaussian, rel=1e-9)
    assert renyi_kernel_entropy(x) == close(literal_renyi(x, 4), rel=1e-6)
    assert renyi_kernel_entropy(x, 2.5) == close(literal_renyi(x, 2.5), rel=1e-6)
    spectrum = literal_spectrum(x)
    assert renyi_matrix_entropy(x) == close(-math.log(sum(v**2 for v in spectrum)), abs=1e-9)
    for keep in (1, 3, 60):
        truncated = shannon(spectrum[:keep]) / math.log(d)
        assert truncated_matrix_entropy(x, keep) == close(truncated, abs=1e-9)
    assert diffusion_entropy(x) == close(literal_diffusion(x, 1), rel=1e-6)
    assert diffusion_entropy(x, 3) == close(literal_diffusion(x, 3), rel=1e-6)
    squares = torch.linalg.eigvals(x.double().T @ x.double()).real.clamp_min(0).tolist()
    singular = [math.sqrt(value) for value in squares]
    rank = math.exp(shannon([value / sum(singular) for value in singular]))
    assert effective_rank(x) == close(rank, rel=1e-4)


@pytest.mark.parametrize("d", [2, 8, 32])
def test_gaussian_finds_the_entropy_of_a_gaussian(d: int) -> None:
    scale = torch.linspace(0.5, 2, d)
    truth = d / 2 * math.log(2 * math.pi * math.e) + scale.log().sum().item()
    assert gaussian_entropy(normal(20000, d) * scale) == pytest.approx(truth, rel=0.02)


def test_order_two_of_a_gaussian_is_the_log_of_its_dimensions() -> None:
    assert renyi_matrix_entropy(normal(20000, 8)) == pytest.approx(math.log(8), abs=0.01)
    assert effective_rank(normal(20000, 8)) == pytest.approx(8, rel=0.01)


def test_three_clusters_are_three_states_of_the_walk() -> None:
    x = torch.eye(3).repeat(10, 1) * 1000 + normal(30, 3) / 1000
    near = math.exp(-1 / 2)  # the median distance is that of two clusters
    values = [1, *[(1 - near) / (1 + 2 * near)] * 2]
    assert diffusion_entropy(x) == pytest.approx(
        shannon([v / sum(values) for v in values]), abs=0.01
    )
    assert renyi_matrix_entropy(x) == pytest.approx(math.log(2), abs=1e-3)  # all in one plane


def test_tokens_at_right_angles_fill_every_direction() -> None:
    x = torch.cat([torch.eye(6), -torch.eye(6)])
    assert renyi_matrix_entropy(x) == pytest.approx(math.log(6))
    assert truncated_matrix_entropy(x, 6) == pytest.approx(1)
    assert truncated_matrix_entropy(x, 3) == pytest.approx(0.5)
    assert effective_rank(x) == pytest.approx(6)


@pytest.mark.parametrize("x", [torch.full((40, 3), 0.1), torch.zeros(7, 4), torch.ones(1, 5)])
def test_tokens_that_do_not_differ_have_none(x: torch.Tensor) -> None:
    of_tokens: list[Callable[[torch.Tensor], float]] = [
        renyi_kernel_entropy,
        renyi_matrix_entropy,
        diffusion_entropy,
        lambda x: truncated_matrix_entropy(x, 2),
    ]
    for entropy in of_tokens:
        assert entropy(x) == pytest.approx(0, abs=1e-6)
    assert effective_rank(x) == pytest.approx(float(x.any()), abs=1e-6)
    assert math.isfinite(gaussian_entropy(x))


def test_most_tokens_equal_leave_a_kernel_of_equals() -> None:
    x = torch.zeros(10, 3)
    x[0] = 5
    assert diffusion_entropy(x) == pytest.approx(math.log(2))
    assert renyi_kernel_entropy(x) == pytest.approx(-math.log(0.82) / 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 99), st.floats(0.01, 100))
def test_bounds_and_what_changes_nothing(n: int, d: int, seed: int, scale: float) -> None:
    x = normal(n, d, seed=seed)
    turn = torch.linalg.qr(normal(d, d, seed=seed + 1)).Q
    moved = x.flip(0) * scale + 7
    least = min(n, d)
    renyi, matrix = renyi_kernel_entropy(x), renyi_matrix_entropy(x)
    diffusion, rank = diffusion_entropy(x), effective_rank(x)
    assert 0 < renyi <= math.log(n) / 3
    assert -1e-9 <= matrix <= matrix_entropy(x) * math.log(d) + 1e-9
    assert 0 <= diffusion <= math.log(n)
    assert 1 <= rank <= least + 1e-9
    shift = d * math.log(scale)
    assert gaussian_entropy(moved) == pytest.approx(gaussian_entropy(x) + shift, abs=1e-2)
    assert renyi_kernel_entropy(moved) == pytest.approx(renyi, abs=1e-3)
    assert renyi_matrix_entropy(moved @ turn) == pytest.approx(matrix, abs=1e-3)
    assert diffusion_entropy(moved @ turn) == pytest.approx(diffusion, abs=1e-3)
    assert effective_rank(x.flip(0) @ turn * scale) == pytest.approx(rank, rel=1e-4)
    kept = [truncated_matrix_entropy(x, keep) for keep in range(1, least + 1)]
    assert all(more >= less - 1e-9 for less, more in pairwise(kept))
    assert kept[-1] == pytest.approx(matrix_entropy(x), abs=1e-9)


def test_a_longer_walk_forgets_the_small_eigenvalues() -> None:
    entropies = [diffusion_entropy(normal(40, 6), t) for t in (1, 2, 5, 50)]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < 0.1 * entropies[0]


def test_attention_entropy_of_heads_that_look_everywhere_or_at_one_key() -> None:
    everywhere, one = torch.full((5, 4), 0.25), torch.eye(4)[[0, 1, 2, 3, 3]]
    assert attention_entropy(everywhere[None]) == pytest.approx(math.log(4))
    assert attention_entropy(one[None]) == 0
    both = attention_entropy(torch.stack([everywhere, one]))
    assert both == pytest.approx(math.log(4) / 2)


def test_attention_entropy_of_a_causal_head_counts_what_each_query_may_see() -> None:
    uniform = torch.ones(6, 6).tril()
    uniform /= uniform.sum(1, keepdim=True)
    expected = sum(math.log(i + 1) for i in range(6)) / 6
    assert attention_entropy(uniform[None]) == pytest.approx(expected, rel=1e-6)
    assert attention_entropy(uniform[None].bfloat16()) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_next_token_entropy_is_the_formula_in_any_number_of_slices(tokens: int) -> None:
    logits = normal(tokens, 11) * 3
    expected = [shannon(torch.softmax(row.double(), 0).tolist()) for row in logits]
    assert next_token_entropy(logits) == pytest.approx(math.fsum(expected) / tokens, rel=1e-9)
    assert next_token_entropy(logits + 100) == pytest.approx(next_token_entropy(logits), rel=1e-4)


def test_next_token_entropy_of_sure_and_clueless_models() -> None:
    assert next_token_entropy(torch.zeros(3, 50)) == pytest.approx(math.log(50))
    ruled_out = torch.full((3, 50), -math.inf)
    ruled_out[:, :2] = 1
    assert next_token_entropy(ruled_out) == pytest.approx(math.log(2))


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (0.5, 2.0), (1.0, 2.0)])
def test_pq_index_is_the_formula(p: float, q: float) -> None:
    w = normal(7, 9) * 1e-3
    sizes = [abs(v) for v in w.double().flatten().tolist()]
    norms = [sum(v**power for v in sizes) ** (1 / power) for power in (p, q)]
    expected = 1 - 63 ** (1 / q - 1 / p) * norms[0] / norms[1]
    assert pq_index(w, p, q) == pytest.approx(expected, rel=1e-9)
    assert pq_index(w.flatten().flip(0) * -1e6, p, q) == pytest.approx(expected, rel=1e-5)


def test_pq_index_of_the_densest_and_the_sparsest() -> None:
    one = torch.zeros(4, 4)
    one[1, 2] = -3e38
    assert pq_index(one) == pytest.approx(1 - 1 / 16)
    assert pq_index(torch.tensor([2.0, -2.0, 2.0])) == pytest.approx(0)
    assert pq_index(torch.zeros(3)) == 0


def test_pq_index_grows_as_weights_vanish() -> None:
    w = normal(1000)
    indices = [pq_index(torch.where(w.abs() > cut, w, 0)) for cut in (0, 0.5, 1, 2)]
    assert indices == sorted(indices)
    assert indices[0] < indices[-1]


def test_angular_distance_of_same_turned_and_opposite_tokens() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert angular_distance(x, 3 * x) == pytest.approx(0, abs=1e-8)
    assert angular_distance(x, y) == pytest.approx(0.5)
    assert angular_distance(x, -x) == pytest.approx(1)
    assert angular_distance(torch.cat([x, x]), torch.cat([x, y])) == pytest.approx(0.25)


def test_angles_obey_the_triangle_inequality() -> None:
    points = [normal(1, 5, seed=seed) for seed in range(6)]
    for a, b in combinations_with_replacement(points, 2):
        for c in points:
            through = angular_distance(a, c) + angular_distance(c, b)
            assert angular_distance(a, b) <= through + 1e-9


def test_bfloat16_is_read_as_it_is() -> None:
    x = normal(20, 12).to(torch.bfloat16)
    of_tokens = (gaussian_entropy, renyi_kernel_entropy, diffusion_entropy, effective_rank)
    for measure in (*of_tokens, renyi_matrix_entropy, next_token_entropy, pq_index):
        assert measure(x) == measure(x.double())
