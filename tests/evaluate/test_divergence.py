from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.evaluate.bootstrap import Interval
from compress.evaluate.distributions import MEASURES
from compress.evaluate.divergence import Divergence, divergence
from compress.evaluate.documents import Documents
from compress.evaluate.likelihood import losses, perplexity, perplexity_ratio
from compress.signals import matrix_entropy, nuclear_norm

LENGTHS = (60, 30, 2, 128, 47, 5, 64, 64, 9, 33, 21, 80, 17)


def load(path: Path) -> Any:
    return checkpoint.open(path).load_model(dtype="float32")


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Any:
    return load(tiny_llama)


@pytest.fixture(scope="module")
def candidate(tiny_llama: Path) -> Any:
    """The reference after some noise: it agrees often, not always."""
    model = load(tiny_llama)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    return model


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Twelve documents, of which the first has two windows."""
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]
    return Documents(windows, [0, *range(12)], 12)


@pytest.fixture(scope="module")
def found(reference: Any, candidate: Any, documents: Documents) -> Divergence:
    return divergence(reference, candidate, documents, top_k=7)


def whole(model: Any, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits and the final hidden state of a window, float64."""
    with torch.no_grad():
        output = model(input_ids=window[None], output_hidden_states=True)
    return output.logits[0].double(), output.hidden_states[-1][0].double()


def test_every_sum_is_what_whole_logits_give(
    found: Divergence, reference: Any, candidate: Any, documents: Documents
) -> None:
    expected = {name: np.zeros(12) for name in found.sums}
    for owner, window in documents:
        (a, x), (b, y) = whole(reference, window), whole(candidate, window)
        p, q, targets = a[:-1].softmax(1), b[:-1].softmax(1), window[1:]
        m = (p + q) / 2
        top = p.topk(7).indices
        buckets = [
            torch.cat([d.gather(1, top), 1 - d.gather(1, top).sum(1, keepdim=True)], 1)
            for d in (p, q)
        ]
        right = [d.argmax(1) == targets for d in (p, q)]

        def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
            return (p * (p / q).log()).sum()

        values = {
            "windows": 1,
            "tokens": len(targets),
            "nll_reference": -p[range(len(targets)), targets].log().sum(),
            "nll": -q[range(len(targets)), targets].log().sum(),
            "kl": kl(p, q),
            "kl_top_k": kl(*buckets),
            "jsd": (kl(p, m) + kl(q, m)) / 2,
            "top1_agreement": (p.argmax(1) == q.argmax(1)).sum(),
            "flip_rate": (right[0] != right[1]).sum(),
            "matrix_entropy_reference": matrix_entropy(x),
            "matrix_entropy": matrix_entropy(y),
            "nuclear_norm_reference": nuclear_norm(x),
            "nuclear_norm": nuclear_norm(y),
        }
        assert values.keys() == found.sums.keys()
        for name, value in values.items():
            expected[name][owner] += float(value)
    for name, sums in found.sums.items():
        assert sums == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
        assert sums.dtype == np.float64
    assert (found.documents, found.tokens) == (12, documents.tokens)


def test_the_likelihoods_are_those_of_losses(
    found: Divergence, reference: Any, candidate: Any, documents: Documents
) -> None:
    for model, name in ((reference, "nll_reference"), (candidate, "nll")):
        scored = losses(model, documents)
        np.testing.assert_allclose(found.sums[name], scored[:, 0], rtol=1e-6)
        np.testing.assert_array_equal(found.sums["tokens"], scored[:, 1])


def test_metrics_are_shares_and_means_with_intervals(found: Divergence) -> None:
    sums, metrics = found.sums, found.metrics(confidence=0.9)
    for name in MEASURES[2:]:
        assert metrics[name].estimate == pytest.approx(sums[name].sum() / found.tokens)
    scored = [np.stack([sums[name], sums["tokens"]], 1) for name in ("nll_reference", "nll")]
    assert metrics["perplexity_reference"].estimate == pytest.approx(perplexity(scored[0]))
    assert metrics["perplexity"].estimate == pytest.approx(perplexity(scored[1]))
    assert metrics["perplexity_ratio"] == perplexity_ratio(*scored, confidence=0.9)
    for name in ("matrix_entropy", "matrix_entropy_reference", "nuclear_norm"):
        by_document = sums[name] / sums["windows"]
        assert metrics[name].estimate == pytest.approx(by_document.mean())
        assert 0 < by_document[0] < 1
    assert len(metrics) == 12
    for interval in metrics.values():
        assert interval.confidence == 0.9
        assert interval.low <= interval.estimate <= interval.high
    assert metrics["kl"].low < metrics["kl"].estimate < metrics["kl"].high
    assert found.metrics(0.99)["kl"].high > metrics["kl"].high


def test_a_model_does_not_differ_from_itself(
    reference: Any, tiny_llama: Path, documents: Documents
) -> None:
    for same in (load(tiny_llama), reference):
        metrics = divergence(reference, same, documents).metrics()
        assert metrics["perplexity_ratio"] == Interval(1, 1, 1, 0.95)
        assert metrics["top1_agreement"] == Interval(1, 1, 1, 0.95)
        for name in ("kl", "kl_top_k", "flip_rate"):
            assert metrics[name] == Interval(0, 0, 0, 0.95)
        assert metrics["jsd"].high < 1e-6
        assert metrics["matrix_entropy"] == metrics["matrix_entropy_reference"]


def test_models_of_other_dtypes_and_depths_are_compared(
    reference: Any, make_llama: Callable[..., Path], tmp_path: Path, documents: Documents
) -> None:
    other = checkpoint.open(make_llama(tmp_path, num_hidden_layers=2)).load_model()
    assert next(other.parameters()).dtype == torch.bfloat16
    metrics = divergence(reference, other, documents).metrics()
    assert 0 < metrics["jsd"].estimate <= math.log(2)
    assert metrics["kl"].estimate > metrics["kl_top_k"].estimate > 0


def test_a_larger_top_tells_more(reference: Any, candidate: Any, documents: Documents) -> None:
    few, many, all_of_it = (
        divergence(reference, candidate, documents, top_k=k).sums for k in (2, 50, 1000)
    )
    assert few["kl_top_k"].sum() < many["kl_top_k"].sum() < many["kl"].sum()
    assert all_of_it["kl_top_k"] == pytest.approx(many["kl"], rel=1e-5, abs=1e-7)
    with pytest.raises(BadInput, match="got top_k 0, expected 1 or more"):
        divergence(reference, candidate, documents, top_k=0)


@pytest.mark.parametrize("which", ["reference", "candidate"])
def test_logits_that_are_nan_name_the_model_and_the_document(
    which: str, reference: Any, tiny_llama: Path, documents: Documents
) -> None:
    broken = load(tiny_llama)
    last = documents.windows[7]
    token = next(int(t) for t in last[:-1] if t not in torch.cat(documents.windows[:7]))
    with torch.no_grad():
        broken.model.embed_tokens.weight[token] = math.nan
    models = (broken, reference) if which == "reference" else (reference, broken)
    with pytest.raises(BadInput, match=f"^document 6: NaN logits: the {which}"):
        divergence(*models, documents)


def test_vocabularies_of_different_sizes_are_refused(
    reference: Any, make_llama: Callable[..., Path], tmp_path: Path, documents: Documents
) -> None:
    padded = load(make_llama(tmp_path, vocab_size=384))
    with pytest.raises(BadInput, match="^candidate: .* got 384, expected 320 as the reference's"):
        divergence(reference, padded, documents)


def test_windows_that_one_model_cannot_read_are_refused(
    reference: Any, make_llama: Callable[..., Path], tmp_path: Path, documents: Documents
) -> None:
    short = load(make_llama(tmp_path, max_position_embeddings=100))
    with pytest.raises(BadInput, match="^candidate: .* got 128 tokens, expected at most 100"):
        divergence(reference, short, documents)
    with pytest.raises(BadInput, match="^reference: "):
        divergence(short, reference, documents)


def test_a_model_without_a_head_is_refused(reference: Any, documents: Documents) -> None:
    with pytest.raises(BadInput, match="without a language-model head, got LlamaModel"):
        divergence(reference, reference.model, documents)


def test_progress_counts_tokens_and_no_hook_stays(
    reference: Any, candidate: Any, documents: Documents, recorder: Any
) -> None:
    divergence(reference, candidate, documents, progress=recorder)
    assert recorder.totals == recorder.done == {"tokens": documents.tokens}
    assert not reference.lm_head._forward_pre_hooks
    assert not candidate.lm_head._forward_pre_hooks
