"""LoRA on packed models: trained beside the weights, never lost in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.errors import BadInput

peft = pytest.importorskip("peft")
IDS = torch.arange(24).view(2, 12) * 7
Pack = Callable[..., Any]


def config(**options: Any) -> Any:
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )


@pytest.fixture
def models(tiny_llama: Path, pack_model: Pack) -> tuple[Any, Any]:
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    return dense, pack_model(copy.deepcopy(dense))


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, config(**options))


def train(model: Any, steps: int = 2) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_changes_adapters_and_nothing_else(
    models: tuple[Any, Any], checkpointing: bool
) -> None:
    dense, packed = map(adapted, models)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    if checkpointing:
        packed.enable_input_require_grads()
        packed.gradient_checkpointing_enable()
    assert train(packed.train()) == pytest.approx(train(dense.train()), rel=1e-3)
    changed = {
        name
        for name, tensor in packed.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all("lora_" in name for name in changed)
    assert any("lora_A" in name for name in changed)
    names = {name for name in before if "lora_" in name}
    assert names == {name for name in dense.state_dict() if "lora_" in name}


@pytest.mark.parametrize("safe", [False, True])
def test_merging_fails_loudly_and_changes_nothing(models: tuple[Any, Any], safe: bool) -> None:
    model = adapted(models[1])
    train(model)
    expected = model.eval()(IDS).logits
    with pytest.raises(BadInput, match="packed weights cannot be changed; load the model without"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(model(IDS).logits, expected)


def test_an_adapter_saved_of_one_fits_the_other(models: tuple[Any, Any], tmp_path: Path) -> None:
    dense, packed = models
    trained = adapted(packed)
    train(trained)
    trained.save_pretrained(tmp_path)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 1
    assert sizes[0] < 40_000
    loaded = peft.PeftModel.from_pretrained(dense, tmp_path)
    assert torch.equal(loaded.eval()(IDS).logits, trained.eval()(IDS).logits)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_begin_by_changing_weights_are_refused(
    models: tuple[Any, Any], init: str
) -> None:
    with pytest.raises(BadInput, match="packed weights cannot be changed"):
        adapted(models[1], init_lora_weights=init)


def test_adapters_of_embeddings_and_magnitudes(models: tuple[Any, Any]) -> None:
    options = {"r": 4, "target_modules": ["embed_tokens", "v_proj"], "use_dora": True}
    found = []
    for model in models:
        torch.manual_seed(0)
        trained = peft.get_peft_model(model, peft.LoraConfig(**options, task_type="CAUSAL_LM"))
        train(trained)
        found.append(trained.eval()(IDS).logits)
    assert torch.allclose(*found, atol=0.05)


def test_the_adapters_of_transformers(models: tuple[Any, Any]) -> None:
    found = []
    for model in models:
        torch.manual_seed(0)
        model.add_adapter(config(init_lora_weights=False))
        model.eval()
        found.append(model(IDS).logits)
        model.disable_adapters()
        found.append(model(IDS).logits)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_packed_module_to_be_trained_whole_is_refused(models: tuple[Any, Any], name: str) -> None:
    with pytest.raises(BadInput, match="packed weights cannot be changed"):
        adapted(models[1], modules_to_save=[name])


def test_a_dense_module_is_trained_whole(models: tuple[Any, Any]) -> None:
    model = adapted(models[1], modules_to_save=["norm"])
    before = model.base_model.model.model.norm.weight.clone()
    train(model)
    assert not torch.equal(model.base_model.model.model.norm.weight, before)


def test_prepared_as_quantized_models_are(models: tuple[Any, Any]) -> None:
    """PEFT casts to fp32 all that it sees, which packed weights are not."""
    packed = peft.prepare_model_for_kbit_training(models[1], use_gradient_checkpointing=False)
    packed = adapted(packed)
    assert {parameter.dtype for parameter in packed.parameters()} == {torch.float32}
    assert train(packed, 3)[-1] == pytest.approx(train(adapted(models[0]), 3)[-1], rel=0.02)
    assert packed(IDS).logits.dtype == torch.float32
