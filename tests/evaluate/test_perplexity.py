from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from compress import checkpoint
from compress.evaluate.perplexity import perplexity


def test_it_is_exp_of_the_mean_loss(tiny_llama: Path) -> None:
    model = checkpoint.open(tiny_llama).load_model(dtype="float32")
    tokens = torch.randint(0, 256, (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert perplexity(model, tokens) == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary(tiny_llama: Path) -> None:
    model = checkpoint.open(tiny_llama).load_model(dtype="float32")
    torch.nn.init.zeros_(model.lm_head.weight)
    tokens = torch.arange(128)[None]
    assert perplexity(model, tokens) == pytest.approx(model.config.vocab_size, rel=1e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (0, 8)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected tokens"):
        perplexity(None, torch.zeros(shape, dtype=torch.int64))
