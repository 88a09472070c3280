from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.signals.bucket import bucket_entropy
from compress.signals.cosine import cosine_distance
from compress.signals.knn import knn_entropy
from compress.signals.norm_ratio import norm_ratio
from compress.signals.sinks import ordinary_tokens, sinks_written


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def literal_knn(x: torch.Tensor, k: int) -> float:
    """The formula, token by token in float64."""
    points = x.double().tolist()
    d, total = len(points[0]), 0.0
    for i, point in enumerate(points):
        others = (math.dist(point, other) for j, other in enumerate(points) if j != i)
        total += math.log(sorted(others)[k - 1] + 1e-10)
    volume = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return d * total / len(points) + volume + math.log(len(points)) - math.log(k)


def literal_bucket(x: torch.Tensor, bins: int) -> float:
    """Every feature's histogram, by comparing with the bins' lower edges."""
    total = 0.0
    for feature in x.T:
        edges = torch.linspace(0, 1, bins + 1) * (feature.max() - feature.min()) + feature.min()
        places = (feature[None] >= edges[:-1, None]).sum(0) - 1
        for bin in range(bins):
            share = (places == bin).sum().item() / len(feature)
            total -= share * math.log(share) if share else 0
    return total


@pytest.mark.parametrize(("n", "d", "k"), [(60, 8, 25), (40, 3, 5), (26, 16, 25)])
def test_knn_is_the_formula(n: int, d: int, k: int) -> None:
    x = normal(n, d) * 3 + 2000  # far off: the distances are small beside the norms
    assert knn_entropy(x, k) == pytest.approx(literal_knn(x, k), rel=1e-4)


@pytest.mark.parametrize(("n", "d", "bins"), [(200, 5, 20), (33, 4, 10)])
def test_bucket_is_the_formula(n: int, d: int, bins: int) -> None:
    x = normal(n, d)
    assert bucket_entropy(x, bins) == pytest.approx(literal_bucket(x, bins), rel=1e-9)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_knn_finds_the_entropy_of_a_gaussian(d: int) -> None:
    scale = torch.linspace(0.5, 2, d)
    truth = d / 2 * math.log(2 * math.pi * math.e) + scale.log().sum().item()
    assert knn_entropy(normal(4000, d) * scale, 5) == pytest.approx(truth, rel=0.08)


def test_bucket_of_a_uniform_distribution_is_the_log_of_the_bins() -> None:
    x = (torch.arange(2000) / 1999)[:, None].repeat(1, 3)
    assert bucket_entropy(x, 20) == pytest.approx(3 * math.log(20), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 99))
def test_scaling_shifts_knn_by_the_log_and_leaves_bucket_alone(scale: float, seed: int) -> None:
    x = normal(60, 6, seed)
    shift = 6 * math.log(scale)
    assert knn_entropy(x * scale) == pytest.approx(knn_entropy(x) + shift, abs=1e-3)
    power = 2.0 ** round(math.log2(scale))  # exact, so that no value changes its bin
    assert bucket_entropy(x * power) == bucket_entropy(x)


def test_rotation_and_order_leave_knn_alone() -> None:
    x = normal(80, 6)
    turn = torch.linalg.qr(normal(6, 6, 1)).Q
    assert knn_entropy((x @ turn)[torch.randperm(80)]) == pytest.approx(knn_entropy(x), abs=1e-4)


def test_repeated_and_constant_tokens_give_finite_entropies() -> None:
    x = torch.ones(40, 4)
    assert bucket_entropy(x) == 0
    assert math.isfinite(knn_entropy(x))


def test_knn_needs_more_tokens_than_neighbours() -> None:
    with pytest.raises(ValueError, match="25 tokens"):
        knn_entropy(normal(25, 4))


def test_cosine_of_same_turned_and_opposite_tokens() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert cosine_distance(x, 3 * x) == pytest.approx(0, abs=1e-7)
    assert cosine_distance(x, y) == pytest.approx(1)
    assert cosine_distance(x, -x) == pytest.approx(2)
    assert cosine_distance(torch.cat([x, x]), torch.cat([x, y])) == pytest.approx(0.5)


def test_norm_ratio_is_the_share_of_what_was_added() -> None:
    x = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[3.0, 4.0], [2.0, 2.0]])
    assert norm_ratio(x, y) == pytest.approx((4 / 5 + 1 / 2) / 2)
    assert norm_ratio(x, x) == 0


def test_one_mask_leaves_out_what_is_massive_on_either_side() -> None:
    x, y = normal(20, 4), normal(20, 4, 1)
    attended = torch.ones(20, dtype=torch.bool)
    attended[18:] = False
    x[3] *= 1000
    y[7] *= 1000
    y[19] *= 1000  # padding has no part in it
    kept = ordinary_tokens(x, y, attended).nonzero().flatten().tolist()
    assert kept == [i for i in range(18) if i not in (0, 3, 7)]
    assert sinks_written(x, y, attended) == 1
    left_padded = ordinary_tokens(x, y, attended.flip(0))
    assert left_padded.nonzero().flatten()[0] == 4  # 2 is the first token, 3 massive


def test_an_unmasked_sink_would_feign_a_loss_of_entropy() -> None:
    x = normal(256, 16)
    y = 1.1 * x
    y[0] *= 1000
    assert bucket_entropy(y) - bucket_entropy(x) < -10
    keep = ordinary_tokens(x, y, torch.ones(256, dtype=torch.bool))
    assert bucket_entropy(y[keep]) == pytest.approx(bucket_entropy(x[keep]), abs=0.5)
