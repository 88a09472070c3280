"""Packed modules stand for the dense ones: same logits, nothing lost in silence, ties kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from compress.errors import BadInput, Corrupt
from compress.hf.packed import forms, modules
from compress.hf.packed.view import WeightView

Make = Callable[..., torch.Tensor]
Pack = Callable[..., Any]
IDS = torch.arange(24).view(2, 12) * 7


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.view(torch.int16), other.view(torch.int16))


def linear(weight: Make, form: str = "stored", **options: Any) -> tuple[nn.Linear, nn.Linear]:
    """A packed one, and the same dense."""
    dense = nn.Linear(130, 70, dtype=torch.bfloat16)
    dense.weight = nn.Parameter(weight(70, 130))
    held = copy.deepcopy(dense)
    packed = forms.pack(held.weight, form, smaller=False)
    assert packed is not None
    modules.adopt(held, *packed, **options)
    return held, dense


@pytest.mark.parametrize("exact", modules.EXACT)
def test_logits_are_those_of_the_dense_model(
    form: str, exact: str, tiny_llama: Path, pack_model: Pack
) -> None:
    dense = load(tiny_llama)
    packed = pack_model(copy.deepcopy(dense), form, exact)
    assert {name.split(".")[-2] for name, _ in packed.named_parameters()} == {
        *("input_layernorm", "post_attention_layernorm", "norm")
    }
    with torch.no_grad():
        assert same(packed(IDS).logits, dense(IDS).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(packed.generate(IDS, **options), dense.generate(IDS, **options))


def test_tied_weights_stay_one(tiny_llama_tied: Path, pack_model: Pack) -> None:
    dense = load(tiny_llama_tied)
    packed = pack_model(copy.deepcopy(dense))
    moved = copy.deepcopy(packed)._apply(torch.clone)  # as `to` another device does
    for model in (packed, copy.deepcopy(packed), moved):
        assert model.lm_head.packed is model.model.embed_tokens.packed
        assert same(model(IDS).logits, dense(IDS).logits)


def test_tying_what_is_tied_changes_nothing(tiny_llama_tied: Path, pack_model: Pack) -> None:
    dense = load(tiny_llama_tied)
    packed = pack_model(copy.deepcopy(dense))
    packed.tie_weights()
    packed.resize_token_embeddings(dense.config.vocab_size)
    assert packed.lm_head.packed is packed.model.embed_tokens.packed
    assert same(packed(IDS).logits, dense(IDS).logits)
    assert packed.state_dict().keys() == pack_model(dense).state_dict().keys()


def test_what_is_not_tied_stays_so(tiny_llama: Path, pack_model: Pack) -> None:
    dense = load(tiny_llama)
    packed = pack_model(copy.deepcopy(dense))
    packed.config.tie_word_embeddings = True
    with pytest.raises(BadInput, match="packed weights cannot be changed; .* to merge, tie"):
        packed.tie_weights()
    packed.config.tie_word_embeddings = False
    with pytest.raises(BadInput, match="packed weights cannot be changed; .* resize"):
        packed.resize_token_embeddings(dense.config.vocab_size + 8)
    assert same(packed(IDS).logits, dense(IDS).logits)


class Scaled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


def test_a_subclass_keeps_its_own_forward(form: str, weight: Make) -> None:
    dense = Scaled(70, 20, padding_idx=3, dtype=torch.bfloat16)
    dense.weight = nn.Parameter(weight(70, 20))
    held = copy.deepcopy(dense)
    modules.adopt(held, *forms.pack(held.weight, form, smaller=False))  # type: ignore[misc]
    assert isinstance(held, Scaled)
    assert isinstance(held, modules.PackedEmbedding)
    assert same(held(IDS % 70), dense(IDS % 70))
    assert same(copy.deepcopy(held)(IDS % 70), dense(IDS % 70))


def test_scaled_embeddings_of_gemma(pack_model: Pack) -> None:
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config = Gemma3TextConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    dense = Gemma3ForCausalLM(config).to(torch.bfloat16).eval()
    packed = pack_model(copy.deepcopy(dense))
    assert same(packed(IDS).logits, dense(IDS).logits)


def test_what_is_asked_of_a_weight_without_decoding(
    weight: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, dense = linear(weight)
    monkeypatch.setattr(modules, "unpack", None)
    view = held.weight
    assert isinstance(view, WeightView)
    assert (view.shape, view.dtype, view.device) == ((70, 130), torch.bfloat16, dense.weight.device)
    assert (view.size(0), view.dim(), view.numel(), len(view)) == (70, 2, 9100, 70)
    assert view.is_floating_point()
    assert not view.requires_grad
    assert view.grad is None
    view.requires_grad = False
    view.requires_grad_(False)
    view.requires_grad_(requires_grad=False)
    held.requires_grad_(False)


def test_a_weight_is_used_like_the_dense_one(form: str, weight: Make) -> None:
    held, dense = linear(weight, form)
    x = weight(3, 130, seed=1)
    assert same(functional.linear(x, held.weight, held.bias), dense(x))
    assert same(x @ held.weight.T, x @ dense.weight.T)
    assert same(held.weight[33], dense.weight[33])
    assert same(held.weight[-1], dense.weight[-1])
    assert same(held.weight[2:5, 1], dense.weight[2:5, 1])
    assert same(torch.stack([held.weight, held.weight])[1], dense.weight)
    assert torch.equal(held.weight.float().norm(), dense.weight.float().norm())
    assert "grad_fn" not in repr(held.weight)
    for index in (70, -71):
        with pytest.raises(IndexError, match="size 70"):
            held.weight[index]
    copied = held.weight.clone()
    copied += 1  # an ordinary tensor
    assert not isinstance(copied, WeightView)
    assert same(weight(70, 130).copy_(held.weight), dense.weight)


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: m.weight.add_(1),
    "augmented": lambda m: m.weight.__iadd__(1),
    "item": lambda m: m.weight.__setitem__(0, 1),
    "of an item": lambda m: m.weight[0].zero_(),
    "of a slice": lambda m: m.weight[:3].zero_(),
    "of a view": lambda m: m.weight.view(-1)[5:].fill_(0),
    "transposed": lambda m: m.weight.T.zero_(),
    "detached": lambda m: m.weight.detach().add_(1),
    "data": lambda m: m.weight.data.add_(1),
    "data set": lambda m: setattr(m.weight, "data", torch.zeros(70, 130)),
    "weight set": lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(70, 130))),
    "init": lambda m: nn.init.normal_(m.weight),
    "init of data": lambda m: nn.init.zeros_(m.weight.data),
    "out": lambda m: torch.add(m.bias[:, None], 1, out=m.weight),
    "inplace": lambda m: functional.relu(m.weight, inplace=True),
    "cast to the same": lambda m: m.weight.to(torch.bfloat16).add_(1),
    "parameter": lambda m: nn.Parameter(m.weight).data.add_(1),
    "trained": lambda m: m.weight.requires_grad_(),
    "module trained": lambda m: m.requires_grad_(),
    "all of it trained": lambda m: [p.requires_grad_() for p in m.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_of_a_weight_is_never_lost(change: str, weight: Make) -> None:
    held, dense = linear(weight)
    with pytest.raises(BadInput, match="packed weights cannot be changed; load the model"):
        CHANGES[change](held)
    assert same(held.weight.clone(), dense.weight)


def test_a_float32_input_is_cast_and_its_output_back(form: str, weight: Make) -> None:
    held, dense = linear(weight, form)
    x = weight(3, 130, seed=1)
    y = held(x.float())
    assert y.dtype == torch.float32
    assert torch.equal(y, dense(x).float())
    held.bias.data = held.bias.data.float()
    assert torch.equal(held(x.float()), y)
    held.bias.data = held.bias.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert same(held(x.float()), dense(x.float()))


@pytest.mark.parametrize("cast", ["half", "float", "double"])
def test_a_cast_of_the_weights_is_refused(cast: str, weight: Make) -> None:
    held, dense = linear(weight)
    with pytest.raises(BadInput, match="packed weights keep their dtype, got .*float"):
        getattr(held, cast)()
    with pytest.raises(BadInput, match="packed weights keep their dtype"):
        held.to(torch.float32)
    assert held.bias.dtype == torch.bfloat16
    x = weight(3, 130, seed=1)
    assert same(held.bfloat16().to(torch.bfloat16)(x), dense(x))


def test_moving_away_and_shapes_only(weight: Make) -> None:
    held, _ = linear(weight)
    away = held.to("meta")
    assert away(torch.empty(3, 130, dtype=torch.bfloat16, device="meta")).shape == (3, 70)
    assert away.weight.device.type == "meta"


def test_a_state_dict_is_checked_before_it_is_taken(form: str, weight: Make) -> None:
    held, dense = linear(weight)
    other, _ = linear(lambda *shape: weight(*shape, seed=9), form)
    taken = other.state_dict()
    before = held.packed
    held.load_state_dict(taken)
    x = weight(3, 130, seed=1)
    assert same(held(x), other(x))
    assert held.packed is before  # so that tied modules see it
    assert held.packings["weight"].form == form

    damaged = taken["packed"].clone()
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(Corrupt, match="^packed: "):
        held.load_state_dict({**taken, "packed": damaged})
    wrong = forms.pack(weight(130, 70), form, smaller=False)
    assert wrong is not None
    with pytest.raises(BadInput, match="packed: is another weight"):
        held.load_state_dict({**taken, "packed": wrong[0]})
    assert same(held(x), other(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        held.load_state_dict(dense.state_dict())


@pytest.mark.slow
def test_stored_weights_are_packed_anew_for_a_gpu(
    weight: Make, gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: False)
    held, dense = linear(weight)
    monkeypatch.setattr(forms, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(modules, "form_for", lambda device, dtype: "dense")
    tied = copy.copy(held)
    tied._buffers = dict(held._buffers)
    both = nn.ModuleList([held, tied])
    both._apply(torch.clone)  # as `to` a GPU does
    assert held.packed is tied.packed
    assert held.packings["weight"].form == tied.packings["weight"].form == "dense"
    x = weight(3, 130, seed=1)
    assert same(held(x), dense(x))
    assert same(tied(x), dense(x))


def test_what_cannot_be_adopted(weight: Make) -> None:
    packed = forms.pack(weight(70, 130), "stored")
    assert packed is not None
    for module, expected in (
        (nn.Conv1d(130, 70, 1), "a Conv1d cannot hold a packed weight"),
        (nn.Embedding(70, 130, max_norm=1), "a Embedding with max_norm cannot hold"),
        (nn.Linear(70, 130, dtype=torch.bfloat16), "is another weight, got .* (70, 130), expected"),
        (nn.Linear(130, 70), "is another weight"),
    ):
        before = type(module)
        with pytest.raises(BadInput, match=expected.replace("(70, 130)", r"\(70, 130\)")):
            modules.adopt(module, *packed)
        assert type(module) is before
        assert isinstance(module.weight, nn.Parameter)
    with pytest.raises(BadInput, match="did you mean 'weights'"):
        modules.adopt(nn.Linear(130, 70, dtype=torch.bfloat16), *packed, exact="weihgts")


def test_gradient_checkpointing(tiny_llama: Path, pack_model: Pack) -> None:
    grads = []
    for checkpointing in (False, True):
        model = pack_model(load(tiny_llama)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        assert same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_torch_compile(tiny_llama: Path, pack_model: Pack, part: str, form: str) -> None:
    dense = load(tiny_llama)
    packed = pack_model(copy.deepcopy(dense), form)
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    args: dict[str, Any] = {}
    if part == "self_attn":
        places = torch.arange(5)[None]
        args = {"position_embeddings": dense.model.rotary_emb(x, places), "attention_mask": None}
    block, reference = (getattr(model.model.layers[0], part) for model in (packed, dense))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = reference(x, **args)
    found = compiled(x, **args)
    if part == "self_attn":
        expected, found = expected[0], found[0]
    assert torch.allclose(found, expected, atol=1e-2)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for y, call in zip(inputs, (compiled, reference), strict=True):
        made = call(y, **args)
        (made[0] if part == "self_attn" else made).sum().backward()
    assert inputs[0].grad is not None
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-2)
