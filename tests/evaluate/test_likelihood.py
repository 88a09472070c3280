from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress import checkpoint
from compress.errors import BadInput
from compress.evaluate.documents import Documents
from compress.evaluate.likelihood import losses, perplexity, perplexity_ratio


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return checkpoint.open(tiny_llama).load_model(dtype="float32")


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Windows of several lengths, of which the first document has two."""
    generator = torch.Generator().manual_seed(0)
    lengths = (128, 40, 2, 77)
    windows = [torch.randint(0, 256, (length,), generator=generator) for length in lengths]
    return Documents(windows, [0, 0, 1, 2], 3)


def table(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def test_losses_are_those_of_the_model_itself(model: Any, documents: Documents) -> None:
    expected = np.zeros((3, 2))
    with torch.no_grad():
        for owner, window in documents:
            mean = model(input_ids=window[None], labels=window[None]).loss.item()
            expected[owner] += mean * (len(window) - 1), len(window) - 1
    found = losses(model, documents)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert perplexity(found) == pytest.approx(math.exp(expected[:, 0].sum() / expected[:, 1].sum()))
    assert found[:, 1].sum() == documents.tokens


def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary(
    tiny_llama: Path, documents: Documents
) -> None:
    ignorant = checkpoint.open(tiny_llama).load_model(dtype="float32")
    torch.nn.init.zeros_(ignorant.lm_head.weight)
    assert perplexity(losses(ignorant, documents)) == pytest.approx(320, rel=1e-6)


def test_progress_counts_every_predicted_token(
    model: Any, documents: Documents, recorder: Any
) -> None:
    losses(model, documents, recorder)
    assert recorder.totals == recorder.done == {"tokens": documents.tokens}


def test_logits_that_are_nan_are_refused(tiny_llama: Path, documents: Documents) -> None:
    broken = checkpoint.open(tiny_llama).load_model(dtype="float32")
    with torch.no_grad():
        broken.model.embed_tokens.weight[int(documents.windows[3][-2])] = math.nan
    assert int(documents.windows[3][-2]) not in torch.cat(documents.windows[:3])
    with pytest.raises(BadInput, match="^document 2: NaN logits: the model"):
        losses(broken, documents)


def test_windows_beyond_the_context_are_refused(model: Any) -> None:
    with pytest.raises(BadInput, match="got 129 tokens, expected at most 128"):
        losses(model, Documents([torch.zeros(129, dtype=torch.int64)], [0], 1))


def test_the_ratio_is_of_perplexities_and_documents_are_paired() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 500, 40)
    reference = np.stack([tokens * generator.uniform(1, 6, 40), tokens], axis=1)
    candidate = reference + [[1, 0]] * tokens[:, None] * 0.1  # each loses 0.1 nats a token
    ratio = perplexity_ratio(reference, candidate)
    assert ratio.estimate == pytest.approx(perplexity(candidate) / perplexity(reference))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(0.1),) * 2)  # pairs do not vary
    candidate[:, 0] += tokens * generator.normal(0, 0.05, 40)
    ratio = perplexity_ratio(reference, candidate, confidence=0.9)
    assert 1 < ratio.low < ratio.estimate < ratio.high < 1.2
    assert perplexity_ratio(candidate, reference).estimate == pytest.approx(1 / ratio.estimate)


def test_the_ratio_of_a_model_to_itself_is_exactly_one() -> None:
    scored = table(*((0.1 * n, 3 * n) for n in range(1, 30)))
    ratio = perplexity_ratio(scored, scored)
    assert (ratio.estimate, ratio.low, ratio.high) == (1, 1, 1)


@pytest.mark.parametrize("other", [table((1, 2)), table((1, 2), (3, 5))])
def test_losses_of_other_documents_are_refused(other: np.ndarray) -> None:
    with pytest.raises(BadInput, match="not of the same documents"):
        perplexity_ratio(table((1, 2), (3, 4)), other)
