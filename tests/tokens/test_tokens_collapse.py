from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from compress.errors import BadInput
from compress.tokens.collapse import (
    collapse_layer,
    layer_entropies,
    segment_by_entropy,
    set_entropy,
)

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
IMAGE = 63


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,  # as many as the text model's
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    return LlavaForConditionalGeneration(config).eval()


def literal_entropy(x: torch.Tensor) -> float:
    """By the covariance, whatever its size."""
    centred = x.double() - x.double().mean(dim=0)
    covariance = centred.T @ centred
    values = torch.linalg.eigvalsh(covariance / covariance.trace()).tolist()
    return -sum(v * math.log(v) for v in values if v > 1e-12) / math.log(min(x.shape))


@pytest.mark.parametrize(("n", "d"), [(6, 20), (20, 6), (9, 9)])
def test_set_entropy_is_the_covariances(n: int, d: int) -> None:
    x = normal(n, d) * torch.linspace(0.1, 2, d) + 5
    assert set_entropy(x) == pytest.approx(literal_entropy(x), rel=1e-9)
    assert set_entropy(4 * x) == pytest.approx(set_entropy(x), rel=1e-9)


def test_set_entropy_from_one_direction_to_all() -> None:
    assert set_entropy(torch.ones(4, 8)) == 0
    assert set_entropy(torch.arange(5.0)[:, None] * normal(1, 8)) == pytest.approx(0, abs=1e-9)
    corners = torch.cat([torch.eye(8), -torch.eye(8)])
    assert set_entropy(corners) == pytest.approx(1)


def test_layers_are_measured_on_the_visual_tokens_that_enter_them() -> None:
    model = llava()
    tokens = torch.randint(0, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    tokens[0, 4:20] = IMAGE
    tokens[1, 10:26] = IMAGE
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": normal(2, 3, 32, 32),
    }
    hooks = [len(layer._forward_pre_hooks) for layer in model.model.language_model.layers]
    table = layer_entropies(model, [batch])
    assert [len(x._forward_pre_hooks) for x in model.model.language_model.layers] == hooks
    with torch.inference_mode():
        states = model(**batch, output_hidden_states=True).hidden_states
    expected = [
        [literal_entropy(states[layer][row][tokens[row] == IMAGE]) for layer in range(5)]
        for row in range(2)
    ]
    assert table.dtype == torch.float64
    assert torch.allclose(table, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)


def test_a_text_model_is_measured_on_all_tokens_but_padding_and_the_first() -> None:
    model = llama()
    tokens = torch.randint(0, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros_like(tokens[:, :6]), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    alone = layer_entropies(model, [{"input_ids": tokens}])
    with torch.inference_mode():
        states = model(tokens, output_hidden_states=True).hidden_states
    expected = [literal_entropy(states[layer][0, 1:]) for layer in range(5)]
    assert alone[0].tolist() == pytest.approx(expected, rel=1e-6)
    beside = layer_entropies(model, [{"input_ids": padded, "attention_mask": mask}])
    assert torch.allclose(beside, alone, rtol=1e-4)


def test_a_sink_is_not_taken_for_a_collapse() -> None:
    model = llama()
    sink = 7

    def write(module: Any, args: Any, output: Any) -> Any:
        output = output.clone()
        output[:, sink] *= 1000
        return output

    model.model.layers[1].register_forward_hook(write)
    batches = [
        {"input_ids": torch.randint(0, 60, (2, 40), generator=torch.Generator().manual_seed(s))}
        for s in range(2)
    ]
    table = layer_entropies(model, batches)
    assert table.shape == (4, 5)
    assert table.min() > 0.5
    assert collapse_layer(table) is None


def test_massive_visual_tokens_are_none_either() -> None:
    """A few of an image's tokens are made massive by one layer; the others stay as they are."""
    model = llava()
    tokens = torch.randint(0, 60, (1, 30), generator=torch.Generator().manual_seed(0))
    tokens[0, 4:20] = IMAGE
    batch = {"input_ids": tokens, "pixel_values": normal(1, 3, 32, 32)}
    before = layer_entropies(model, [batch])

    def write(module: Any, args: Any, output: Any) -> Any:
        output = output.clone()
        output[:, 9:11] *= 1000
        return output

    model.model.language_model.layers[1].register_forward_hook(write)
    after = layer_entropies(model, [batch])
    assert after[0, 2] == pytest.approx(float(before[0, 2]), abs=0.1)
    assert collapse_layer(after.repeat(4, 1)) is None


def test_what_cannot_be_measured() -> None:
    model = llava()
    with pytest.raises(BadInput, match="too few tokens to measure, got 0"):
        layer_entropies(model, [{"input_ids": torch.arange(9)[None]}])
    model = llama()
    model.model.layers[2].mlp.down_proj.weight.data[0] = math.nan
    with pytest.raises(BadInput, match="what enters layer 3: .*not finite"):
        layer_entropies(model, [{"input_ids": torch.arange(9)[None]}])
    assert not model.model.layers[0]._forward_pre_hooks


def noisy(profile: list[float], samples: int = 20, noise: float = 0.002) -> torch.Tensor:
    return torch.tensor(profile, dtype=torch.float64) + noise * normal(samples, len(profile))


FLAT = [0.8] * 12


def test_a_sharp_and_consistent_drop_is_found() -> None:
    for layer in (1, 2, 6):
        profile = [0.8] * layer + [0.6] * (12 - layer)
        assert collapse_layer(noisy(profile)) == layer


@pytest.mark.parametrize(
    "profile",
    [
        FLAT,
        [0.04 + 0.01 * layer for layer in range(12)],  # it rises, as in a model that was measured
        [0.8 - 0.05 * layer for layer in range(12)],  # steady, nowhere sharp
        [0.8] * 9 + [0.6] * 3,  # too late to save anything
    ],
)
def test_where_nothing_collapses_none_is_found(profile: list[float]) -> None:
    assert collapse_layer(noisy(profile)) is None
    assert collapse_layer([profile]) is None


def test_a_drop_in_some_samples_only_is_not_consistent() -> None:
    table = noisy(FLAT)
    table[:17, 3:] -= 0.2
    assert collapse_layer(table) is None
    assert collapse_layer(table, share=0.85) == 3
    table[17, 3:] -= 0.2
    assert collapse_layer(table) == 3


def test_sigma_is_how_sharp_a_drop_must_be() -> None:
    table = noisy([0.8] * 3 + [0.78] * 9, noise=0.003)
    assert collapse_layer(table, sigma=1) == 3
    assert collapse_layer(table, sigma=20) is None


def test_tables_that_say_nothing() -> None:
    with pytest.raises(BadInput, match=r"got \[1, 3\], expected \[samples, layers\]"):
        collapse_layer([[0.5, 0.4, 0.3]])
    with pytest.raises(BadInput, match="not finite"):
        collapse_layer([[0.5, math.nan, 0.3, 0.2]])


def test_stages_begin_where_entropy_falls() -> None:
    series = [9.0, 8.5, 6.0, 6.2, 7.5, 6.4, 5.5]
    assert segment_by_entropy(series, 1) == [0, 0, 1, 1, 1, 2, 2]
    assert segment_by_entropy(series, 5) == [0] * 7
    assert segment_by_entropy([], 1) == []
