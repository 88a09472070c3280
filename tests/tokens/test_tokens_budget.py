from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from compress.errors import BadInput
from compress.tokens.budget import KeepBudget
from compress.tokens.flops import predicted_flops, prompt_cost

LLAVA_7B = LlamaConfig(  # the language model of LLaVA-1.5-7B
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},  # heads wider than the hidden size
    "phi3": {},  # fused
    "gpt_neox": {},  # not gated, all heads their own keys
    "gpt2": {"n_inner": 80},  # matrices the other way round
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def small(family: str) -> Any:
    return CONFIG_MAPPING[family](**{**SMALL, **FAMILIES[family]})


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


def experts(tokens: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * tokens[0] * weights[1] * weights[2]


def counted(model: Any, length: int) -> dict[str, int]:
    """What torch counts in one forward pass, by operator."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._grouped_mm: experts,
    }
    if own := getattr(torch.ops.transformers, "grouped_mm_fallback", None):
        formulas[own] = experts
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model(input_ids=torch.arange(length)[None] % 96, use_cache=False)
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_flops_are_what_torch_counts(family: str) -> None:
    config = small(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for length in (48, 200):
        counts = counted(model, length)
        # bmm: the angles of rotation, a few numbers a token
        products = sum(count for op, count in counts.items() if not op.endswith(".bmm"))
        predicted = predicted_flops(config, [length] * 3)
        assert predicted == products
        assert predicted == pytest.approx(sum(counts.values()), rel=0.02)


def test_predicted_flops_of_a_stack_that_grows_short() -> None:
    config = small("llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()

    def shorten(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        cos, sin = kwargs["position_embeddings"]
        return (args[0][:, :40],), {**kwargs, "position_embeddings": (cos[:, :40], sin[:, :40])}

    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(shorten, with_kwargs=True)
    counts = counted(model, 200)
    products = sum(count for op, count in counts.items() if not op.endswith(".bmm"))
    assert predicted_flops(config, [200, 40, 40], logits=40) == products


def test_the_papers_formula_is_the_special_case() -> None:
    n, d, m = 651, 4096, 11008
    paper = 8 * n * d**2 + 4 * n**2 * d + 6 * n * d * m
    assert predicted_flops(LLAVA_7B, [n] * 32, logits=0) == 32 * paper


@pytest.mark.parametrize(
    ("average", "kept", "saved"), [(192, 166, 0.596), (128, 98, 0.693), (64, 29, 0.791)]
)
def test_average_is_the_papers_number_of_tokens(average: int, kept: int, saved: float) -> None:
    assert KeepBudget("average", average).resolve(LLAVA_7B, layer=2, visual=576) == kept
    assert KeepBudget("average", average / 576).resolve(LLAVA_7B, layer=2, visual=576) == kept
    cost = prompt_cost(LLAVA_7B)
    left = cost.flops([651] * 2 + [75 + kept] * 30) / cost.flops([651] * 32)
    assert 1 - left == pytest.approx(saved, abs=5e-4)


def test_kept_is_a_number_or_a_share() -> None:
    assert KeepBudget("kept", 64).resolve(LLAVA_7B, layer=2, visual=576) == 64
    assert KeepBudget("kept", 1 / 3).resolve(LLAVA_7B, layer=2, visual=576) == 192
    assert KeepBudget("kept", 0.999).resolve(LLAVA_7B, layer=2, visual=576) == 575
    assert KeepBudget("kept", 1.0).resolve(LLAVA_7B, layer=2, visual=576) == 576


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 1), st.integers(1, 2), st.integers(1, 300), st.integers(0, 50), st.data())
def test_flops_are_used_up_and_not_exceeded(
    share: float, layer: int, visual: int, text: int, data: st.DataObject
) -> None:
    config = small(data.draw(st.sampled_from(["llama", "gpt2"])))
    cost = prompt_cost(config)

    def flops(kept: int) -> int:
        return cost.flops([visual + text] * layer + [kept + text] * (3 - layer))

    budget = KeepBudget("flops", share)
    if flops(1) > share * flops(visual):
        with pytest.raises(BadInput, match="no token would be left.*at least"):
            budget.resolve(config, layer=layer, visual=visual, text=text)
        return
    kept = budget.resolve(config, layer=layer, visual=visual, text=text)
    assert flops(kept) <= share * flops(visual)
    assert kept == visual or flops(kept + 1) > share * flops(visual)


@pytest.mark.parametrize("measure", ["kept", "average", "flops"])
def test_a_budget_out_of_reach_names_one_within(measure: str) -> None:
    with pytest.raises(BadInput, match="no token would be left, got 0.0001") as refused:
        KeepBudget(measure, 0.0001).resolve(LLAVA_7B, layer=2, visual=576, text=75)
    least = float(str(refused.value).split("at least ")[1].split(";")[0])
    assert KeepBudget(measure, least).resolve(LLAVA_7B, layer=2, visual=576, text=75) >= 1
    with pytest.raises(BadInput, match="no token"):
        KeepBudget(measure, least - 2e-4).resolve(LLAVA_7B, layer=2, visual=576, text=75)


def test_an_average_out_of_reach_in_tokens() -> None:
    with pytest.raises(BadInput, match="got 36, expected at least 37"):
        KeepBudget("average", 36).resolve(LLAVA_7B, layer=2, visual=576)
    assert KeepBudget("average", 37).resolve(LLAVA_7B, layer=2, visual=576) == 1


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(BadInput, match="unknown measure 'flop'; did you mean 'flops'"):
        KeepBudget("flop", 0.5)
    for measure, amount in (("kept", 0), ("kept", 1.5), ("flops", 2), ("average", float("nan"))):
        with pytest.raises(BadInput, match=f"{measure}: no such budget"):
            KeepBudget(measure, amount)
    with pytest.raises(BadInput, match="got 600, expected at most 576"):
        KeepBudget("kept", 600).resolve(LLAVA_7B, layer=2, visual=576)
    for layer in (0, 32):
        with pytest.raises(BadInput, match=f"layer: .*got {layer}, expected 1 to 31"):
            KeepBudget("kept", 64).resolve(LLAVA_7B, layer=layer, visual=576)
    with pytest.raises(BadInput, match="no tokens to choose from"):
        KeepBudget("kept", 0.5).resolve(LLAVA_7B, layer=2, visual=0)
    with pytest.raises(BadInput, match="one length a layer, got 2, expected 32"):
        predicted_flops(LLAVA_7B, [3, 3])


def test_layers_with_more_than_matrices_are_refused() -> None:
    hybrid = CONFIG_MAPPING["falcon_h1"](**SMALL)
    with pytest.raises(BadInput, match="falcon_h1: the operations of .*conv1d.* are not known"):
        prompt_cost(hybrid)
    latent = CONFIG_MAPPING["deepseek_v3"]()
    with pytest.raises(BadInput, match="latent attention"):
        prompt_cost(latent)
