"""Each loss, minimized, betters the number that it is named for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from compress import codec
from compress.quant.qat.attention import Attention
from compress.quant.qat.distill_losses import distillation_loss, hidden_error
from compress.quant.qat.distribution_guide import (
    attention_cosine,
    match_attention,
    repel_attention,
)
from compress.quant.qat.entropy_guide import match_variances, maximize_entropy
from compress.quant.qat.lsq import Lsq
from compress.quant.qat.rate import code_rate
from compress.quant.qtensor import Scheme

SHAPE = (2, 4, 12, 8)  # batch, heads, tokens, d


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(queries: torch.Tensor, keys: torch.Tensor) -> list[Attention]:
    """Of two blocks; the second has the negative queries."""
    found = []
    for q in (queries, -queries):
        scores = q @ keys.repeat_interleave(2, 1).transpose(2, 3)
        future = torch.ones(12, 12).triu(1).bool()
        found.append(Attention(q, keys, scores.masked_fill(future, -torch.inf).softmax(-1)))
    return found


def minimize(loss: Callable[[], torch.Tensor], *values: torch.Tensor, steps: int = 30) -> None:
    adam = torch.optim.Adam([value.requires_grad_(True) for value in values], lr=0.03)
    for _ in range(steps):
        adam.zero_grad()
        loss().backward()
        adam.step()


@pytest.fixture
def states() -> tuple[list[Attention], torch.Tensor, torch.Tensor]:
    """A teacher's attention, and a student's queries and keys: blurred, and too small."""
    queries, keys = noise(*SHAPE, seed=0), noise(2, 2, 12, 8, seed=1)
    blurred = 0.6 * queries + 0.3 * noise(*SHAPE, seed=2)
    return attention(queries, keys), blurred, 0.7 * keys + 0.2 * noise(2, 2, 12, 8, seed=3)


def cosine(student: Sequence[Attention], teacher: Sequence[Attention]) -> float:
    return float(attention_cosine(student, teacher).detach())


def mismatch(student: Sequence[Attention], teacher: Sequence[Attention]) -> float:
    """Largest ratio of variances by head, at least 1."""
    ratios = [
        (a.queries.var((0, 2, 3)) / b.queries.var((0, 2, 3)))
        for a, b in zip(student, teacher, strict=True)
    ]
    found = torch.cat(ratios)
    return float(torch.maximum(found, 1 / found).max().detach())


def variances(student: Sequence[Attention]) -> float:
    return sum(float((seen.queries.var() * seen.keys.var()).detach()) for seen in student)


def test_the_distribution_guide_draws_attention_to_the_teachers(
    states: tuple[list[Attention], torch.Tensor, torch.Tensor],
) -> None:
    teacher, queries, keys = states
    before = cosine(attention(queries, keys), teacher)
    minimize(lambda: match_attention(attention(queries, keys), teacher), queries, keys)
    assert before < 0.9
    assert cosine(attention(queries, keys), teacher) > before + 0.05


def test_the_distribution_guide_as_printed_drives_attention_away(
    states: tuple[list[Attention], torch.Tensor, torch.Tensor],
) -> None:
    teacher, queries, keys = states
    before = cosine(attention(queries, keys), teacher)
    minimize(lambda: repel_attention(attention(queries, keys), teacher), queries, keys)
    assert cosine(attention(queries, keys), teacher) < before - 0.05


def test_the_cosine_of_equal_maps_is_one(
    states: tuple[list[Attention], torch.Tensor, torch.Tensor],
) -> None:
    teacher, *_ = states
    assert cosine(teacher, teacher) == pytest.approx(1)
    assert float(match_attention(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    # two blocks of four heads
    assert float(repel_attention(teacher, teacher)) == pytest.approx(float(torch.tensor(8.0).log()))


def test_the_entropy_guide_matches_variances(
    states: tuple[list[Attention], torch.Tensor, torch.Tensor],
) -> None:
    teacher, queries, keys = states
    before = mismatch(attention(queries, keys), teacher)
    minimize(lambda: match_variances(attention(queries, keys), teacher), queries, keys)
    after = mismatch(attention(queries, keys), teacher)
    assert before > 2
    assert after < 1.2
    assert float(match_variances(teacher, teacher)) == 0


def test_the_entropy_guide_as_printed_inflates_them(
    states: tuple[list[Attention], torch.Tensor, torch.Tensor],
) -> None:
    teacher, queries, keys = states
    before = variances(attention(queries, keys))
    minimize(lambda: maximize_entropy(attention(queries, keys)), queries, keys, steps=60)
    assert variances(attention(queries, keys)) > max(2 * before, variances(teacher))


def test_equation_12_by_hand() -> None:
    queries = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1).repeat(1, 2, 1, 1)  # variances 1
    keys = torch.tensor([2.0, -2.0]).view(1, 1, 2, 1)  # variance 4
    seen = [Attention(queries, keys, torch.eye(2).repeat(1, 2, 1, 1))] * 3
    expected = -(6 * torch.tensor(5.0).log()).log()  # three blocks of two heads
    assert float(maximize_entropy(seen)) == pytest.approx(float(expected))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_rate_lowers_the_bits_that_a_huffman_code_takes(bits: int) -> None:
    w = noise(64, 1024, seed=4) * 0.02
    fake = Lsq(w, Scheme(bits, None, True), torch.bfloat16, "w")

    def huffman() -> float:
        codes = fake.qtensor().codes.flatten().view(torch.uint8)
        counts = torch.bincount(codes, minlength=256).tolist()
        lengths = codec.code_lengths(counts)
        return sum(n * length for n, length in zip(counts, lengths, strict=True)) / w.numel()

    before = huffman()
    minimize(lambda: code_rate(fake.ratio(), fake.limit), fake.log_step, steps=10)
    by_steps = huffman()
    assert by_steps < before - 0.2
    adam = torch.optim.Adam([fake.weight], lr=1e-3)
    for _ in range(10):
        adam.zero_grad()
        code_rate(fake.ratio(), fake.limit).backward()
        adam.step()
    assert huffman() < by_steps - 0.1


def test_the_rate_of_codes_is_their_entropy() -> None:
    codes = torch.tensor([0.0] * 8 + [1.0] * 4 + [-1.0] * 2 + [3.0] * 2)
    assert float(code_rate(codes, 7)) == pytest.approx(1.75)
    assert float(code_rate(torch.zeros(5), 7)) == 0
    between = codes.clone()
    between[0] = 0.25  # a quarter of the way from a code of 1 bit to one of 2
    assert float(code_rate(between, 7)) == pytest.approx(1.75 + 0.25 / 16)


def test_the_rate_leaves_alone_what_is_beyond_the_codes() -> None:
    ratio = torch.tensor([0.2, -0.3, 1.2, 9.0, -8.0], requires_grad=True)
    code_rate(ratio, 3).backward()
    assert ratio.grad is not None
    assert ratio.grad[3:].tolist() == [0, 0]
    assert ratio.grad[:3].ne(0).any()


def test_the_distillation_loss_draws_logits_to_the_teachers_and_to_the_text() -> None:
    teacher, tokens = 2 * noise(10, 20, seed=5), torch.arange(10) % 7

    def divergence(student: torch.Tensor) -> float:
        log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
        return float((log_p.exp() * (log_p - log_q)).sum(1).mean())

    def surprise(student: torch.Tensor) -> float:
        return float(-student.log_softmax(1)[range(9), tokens[1:]].mean())

    for soft, metric in ((1.0, divergence), (0.0, surprise)):
        student = noise(10, 20, seed=6)
        before = metric(student)

        def loss(student: torch.Tensor = student, soft: float = soft) -> torch.Tensor:
            return distillation_loss(student, teacher, tokens, soft=soft, temperature=2.0)

        minimize(loss, student)
        assert metric(student.detach()) < 0.8 * before
    same = distillation_loss(teacher, teacher, tokens, soft=1.0, temperature=2.0)
    assert float(same) == pytest.approx(0, abs=1e-6)
    mixed, hard, all_soft = (
        float(distillation_loss(student.detach(), teacher, tokens, soft=share, temperature=2.0))
        for share in (0.25, 0.0, 1.0)
    )
    assert mixed == pytest.approx(0.75 * hard + 0.25 * all_soft)


def test_the_hidden_error_is_relative_by_token() -> None:
    teacher = torch.tensor([[3.0, 4.0], [3000.0, 4000.0]])
    student = teacher + torch.tensor([[5.0, 0.0], [0.0, 0.0]])
    assert float(hidden_error(student, teacher)) == 0.5
    assert float(hidden_error(teacher, teacher)) == 0
    assert float(hidden_error(torch.zeros(1, 2), torch.zeros(1, 2))) == 0
