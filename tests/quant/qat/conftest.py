"""A tiny random float32 Llama, its text, and its weights to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.quant.qtensor import Scheme


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """Made anew each time, always the same; wide enough for attention to differ between heads."""

    def make(**options: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        }
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **options})).eval()

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    def make(seed: int = 0, sequences: int = 4) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 61, (sequences, 50), generator=generator)

    return make


@pytest.fixture(scope="session")
def projections() -> Callable[..., dict[str, Scheme]]:
    """All linear layers of the blocks, or those of some, as targets."""

    def choose(model: Any, scheme: Scheme, *blocks: int) -> dict[str, Scheme]:
        wanted = [f"layers.{block}." for block in blocks] or ["layers."]
        return {
            name: scheme
            for name, _ in model.named_parameters()
            if "_proj" in name and any(part in name for part in wanted)
        }

    return choose
