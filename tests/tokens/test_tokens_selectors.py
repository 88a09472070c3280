from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import BadInput
from compress.signals import matrix_entropy, renyi_matrix_entropy
from compress.tokens.segment import Segment
from compress.tokens.selectors import SELECTORS, make_selector
from compress.tokens.selectors.released import released
from compress.tokens.selectors.renyi2 import renyi2
from compress.tokens.selectors.von_neumann import von_neumann

EVERY = [(name, {}) for name in sorted(SELECTORS)] + [("logdet", {"relevance": True})]
every = pytest.mark.parametrize(("name", "options"), EVERY)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segment(n: int = 20, seed: int = 0, **values: Any) -> Segment:
    last, mutual = normal(n, seed=seed + 3).softmax(0), normal(n, seed=seed + 4).softmax(0)
    given_ = {
        "hidden": normal(n, 24, seed=seed),
        "query": normal(n, 4, 6, seed=seed + 1),
        "text": normal(5, 24, seed=seed + 2),
        "seed": seed,
        "last_attention": lambda: last,
        "mutual_attention": lambda: mutual,
    }
    return Segment(**{**given_, **values})


def logdet_of(x: torch.Tensor, chosen: list[int], alpha: float = 10.0) -> float:
    rows = torch.nn.functional.normalize(x.double(), dim=1)[chosen]
    kernel = alpha * rows @ rows.T + torch.eye(len(chosen), dtype=torch.float64)
    return torch.logdet(kernel).item()


@every
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 30), st.integers(0, 9), st.data())
def test_what_is_kept_is_ascending_distinct_and_as_many_as_asked(
    name: str, options: dict[str, Any], n: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    one = segment(n, seed)
    kept = make_selector(name, options)(one, k)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == k
    assert 0 <= kept[0] <= kept[-1] < n
    assert torch.equal(make_selector(name, options)(one, k), kept)


@every
def test_all_tokens_are_kept_where_all_may_stay(name: str, options: dict[str, Any]) -> None:
    assert make_selector(name, options)(segment(), 20).tolist() == list(range(20))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_change_nothing_but_their_rounding(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    one = segment()
    rounded = {field: getattr(one, field).to(dtype) for field in ("hidden", "query", "text")}
    widened = {field: value.float() for field, value in rounded.items()}
    select = make_selector(name, options)
    assert torch.equal(select(segment(**rounded), 7), select(segment(**widened), 7))


@every
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_tokens_that_are_all_alike_do_not_matter(
    name: str, options: dict[str, Any], fill: float
) -> None:
    alike = segment(hidden=torch.full((9, 24), fill), query=torch.full((9, 4, 6), fill))
    scores = {"last_attention": lambda: torch.ones(9), "mutual_attention": lambda: torch.ones(9)}
    kept = make_selector(name, options)(
        Segment(alike.hidden, alike.query, alike.text, 0, **scores), 4
    )
    assert len(set(kept.tolist())) == 4
    if name not in ("random", "uniform", "visionzip", "divprune"):
        assert kept.tolist() == [0, 1, 2, 3]  # of equals the first


@every
def test_as_many_as_there_are_not_cannot_be_kept(name: str, options: dict[str, Any]) -> None:
    for k in (0, 21):
        with pytest.raises(BadInput, match=f"got {k}, expected 1 to 20"):
            make_selector(name, options)(segment(), k)


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(
    name: str, options: dict[str, Any], value: float
) -> None:
    if name in ("random", "uniform"):
        return  # they look at nothing
    hidden, query, scores = normal(20, 24), normal(20, 4, 6), torch.rand(20)
    hidden[3, 3] = query[3, 3, 3] = scores[3] = value
    attention = {"last_attention": lambda: scores, "mutual_attention": lambda: scores}
    with pytest.raises(BadInput, match="not finite"):
        make_selector(name, options)(segment(hidden=hidden, query=query, **attention), 5)


@pytest.mark.parametrize("name", ["von_neumann", "released", "renyi2", "energy"])
def test_a_rotation_of_queries_changes_no_choice(name: str) -> None:
    query = normal(20, 4, 6)
    turn = torch.linalg.qr(normal(20, 6, 6, seed=9)).Q  # of each token its own, as by position
    select = make_selector(name)
    turned = select(segment(query=query @ turn), 8)
    assert torch.equal(turned, select(segment(query=query), 8))


@pytest.mark.parametrize(("half", "d"), [(3, 9), (8, 5)])
def test_entropies_are_the_textbooks(half: int, d: int) -> None:
    """Rows of length 1 and mean 0 are what the estimators for hidden states make of any rows."""
    rows = torch.nn.functional.normalize(normal(4, half, d), dim=2)
    query = torch.cat([rows, -rows], dim=1)
    heads = 2 * half
    found = von_neumann(query) * math.log(heads)
    assert found.tolist() == pytest.approx(
        [matrix_entropy(z) * math.log(d) for z in query], rel=1e-5
    )
    found = renyi2(query) * math.log(heads)
    assert found.tolist() == pytest.approx([renyi_matrix_entropy(z) for z in query], rel=1e-5)


def test_entropies_are_shares_and_renyi_is_the_smaller() -> None:
    query = normal(200, 6, 8) * torch.linspace(0.01, 100, 200)[:, None, None]
    assert (renyi2(query) <= von_neumann(query) + 1e-6).all()
    assert 0 < von_neumann(query).min() < von_neumann(query).max() < 1
    assert torch.allclose(von_neumann(7 * query), von_neumann(query), atol=1e-6)
    opposite = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])  # one direction
    assert von_neumann(opposite).item() == pytest.approx(0, abs=1e-6)
    assert renyi2(opposite).item() == pytest.approx(0, abs=1e-6)


def literal_released(query: torch.Tensor) -> list[float]:
    """What the published program does to one token after the other, in float64."""
    scores = []
    for token in query.double():
        heads = len(token)
        centred = token - token.mean(dim=0)
        covariance = centred @ centred.T / heads
        values = torch.linalg.eigvalsh(covariance).clamp_min(1e-10).tolist()
        scores.append(-sum(value * math.log(value) for value in values) / math.log(heads))
    return scores


def test_released_is_the_published_programs_score() -> None:
    query = normal(30, 8, 16) * torch.linspace(0.1, 5, 30)[:, None, None]
    assert released(query).dtype == torch.float64
    assert released(query).tolist() == pytest.approx(literal_released(query), rel=1e-9)


def test_released_keeps_little_energy_and_its_definition_does_not() -> None:
    query = normal(100, 8, 32)
    query[:50] *= 30  # as diverse, but large
    query[50:, 1:] = query[50:, :1] + 1e-1 * query[50:, 1:]  # nearly one direction...
    query[50:, 0] *= -1  # ...and small
    one = segment(100, query=query)
    assert make_selector("released")(one, 50).tolist() == list(range(50, 100))
    assert make_selector("energy")(one, 50).tolist() == list(range(50, 100))
    assert make_selector("von_neumann")(one, 50).tolist() == list(range(50))
    assert make_selector("renyi2")(one, 50).tolist() == list(range(50))


def test_a_single_head_has_no_entropy() -> None:
    with pytest.raises(BadInput, match="single head.*logdet"):
        make_selector("renyi2")(segment(query=normal(20, 1, 6)), 3)


def test_fastv_keeps_what_the_last_token_looks_at() -> None:
    scores = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1])
    one = segment(5, last_attention=lambda: scores)
    assert make_selector("fastv")(one, 2).tolist() == [1, 3]
    assert make_selector("fastv")(one, 4).tolist() == [0, 1, 2, 3]


def test_visionzip_keeps_the_dominant_and_spaces_the_rest() -> None:
    scores = torch.zeros(64)
    scores[10:16] = 1
    one = segment(64, mutual_attention=lambda: scores)
    assert make_selector("visionzip", {"contextual": 0})(one, 6).tolist() == list(range(10, 16))
    kept = make_selector("visionzip", {"contextual": 0.25})(one, 8).tolist()
    assert kept == [*range(10, 16), 20, 49]  # the 15th and the 44th of the 58 others
    assert make_selector("visionzip", {"contextual": 1})(one, 1).tolist() == [32]


def test_uniform_takes_the_middles_of_equal_parts() -> None:
    assert make_selector("uniform")(segment(), 1).tolist() == [10]
    assert make_selector("uniform")(segment(), 5).tolist() == [2, 6, 10, 14, 18]


def test_random_depends_on_the_segments_seed_and_on_nothing_else() -> None:
    select = make_selector("random")
    state = torch.get_rng_state()
    first, other = select(segment(seed=1), 5), select(segment(seed=2), 5)
    assert first.tolist() != other.tolist()
    assert torch.equal(select(segment(hidden=normal(20, 24, seed=8), seed=1), 5), first)
    assert torch.equal(torch.get_rng_state(), state)
    counts = sum(torch.bincount(select(segment(seed=s), 5), minlength=20) for s in range(400))
    assert 60 < counts.min() <= counts.max() < 140  # 100 each, standard deviation 9


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 99), st.integers(1, 8), st.sampled_from([0.5, 10.0]))
def test_logdet_is_the_greedy_maximum(seed: int, k: int, alpha: float) -> None:
    x = normal(12, 6, seed=seed)
    kept: list[int] = []
    for _ in range(k):
        rest = [i for i in range(12) if i not in kept]
        kept.append(max(rest, key=lambda i: round(logdet_of(x, [*kept, i], alpha), 9)))
    one = segment(12, hidden=x)
    assert make_selector("logdet", {"alpha": alpha})(one, k).tolist() == sorted(kept)
    assert 0 in kept  # alone, all are worth the same


def test_logdet_and_divprune_take_one_of_each_kind() -> None:
    kinds = torch.arange(40) % 4
    hidden = normal(4, 24)[kinds] + 0.01 * normal(40, 24, seed=1)
    for name in ("logdet", "divprune"):
        kept = make_selector(name)(segment(40, hidden=hidden), 4)
        assert sorted(kinds[kept].tolist()) == [0, 1, 2, 3]


def test_logdet_with_relevance_prefers_what_is_like_the_text() -> None:
    hidden = normal(30, 24)
    one = segment(30, hidden=hidden, text=5 * hidden[[7, 22]])
    assert {7, 22} <= set(make_selector("logdet", {"relevance": True})(one, 4).tolist())
    assert not {7, 22} <= set(make_selector("logdet")(one, 4).tolist())
    with pytest.raises(BadInput, match="no text"):
        make_selector("logdet", {"relevance": True})(segment(text=normal(0, 24)), 4)


def test_divprune_takes_the_farthest_from_those_taken() -> None:
    x = normal(15, 5)
    units = torch.nn.functional.normalize(x.double(), dim=1)
    distance = (1 - units @ units.T).tolist()
    alone = [min(distance[i][j] for j in range(15) if j != i) for i in range(15)]
    kept = [alone.index(max(alone))]
    while len(kept) < 6:
        rest = [i for i in range(15) if i not in kept]
        kept.append(max(rest, key=lambda i: min(distance[i][j] for j in kept)))
    assert make_selector("divprune")(segment(15, hidden=x), 6).tolist() == sorted(kept)


def test_names_and_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown selector 'logdets'; did you mean 'logdet'"):
        make_selector("logdets")
    with pytest.raises(BadInput, match="no option 'alhpa'; did you mean 'alpha'"):
        make_selector("logdet", {"alhpa": 1.0})
    with pytest.raises(BadInput, match="relevance: wrong type, got 1, expected bool"):
        make_selector("logdet", {"relevance": 1})
    with pytest.raises(BadInput, match="alpha: out of range, got 0"):
        make_selector("logdet", {"alpha": 0})
    with pytest.raises(BadInput, match="contextual: no share, got 2"):
        make_selector("visionzip", {"contextual": 2.0})
