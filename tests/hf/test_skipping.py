"""A model with skipped parts taken out computes what the model with zeros in their place does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.distributed import DistributedConfig

from compress import checkpoint
from compress.errors import BadInput, Corrupt
from compress.hf.skipping import skip_sublayers
from compress.signals import find_blocks

BLOCKS = 6
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 128}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gemma3_text": {**SIZES, **WINDOW, "sliding_window_pattern": 3},
    "gpt_neox": SIZES,
    "gpt_oss": {**SIZES, **WINDOW, "num_local_experts": 4},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": SIZES,
    "mistral": {**SIZES, "sliding_window": 8},
    "qwen2": {**SIZES, "use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8},
    "qwen3": {**SIZES, "head_dim": 8},
    "gemma2": {**SIZES, **WINDOW},
    "phi3": SIZES,
    "olmo2": SIZES,
    "smollm3": SIZES,
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {
        **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
        "num_layers": BLOCKS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], BLOCKS // 2]],
        "window_size": 8,
    },
    "cohere": SIZES,
    "falcon": SIZES,
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, **EXPERTS, "head_dim": 8, "mlp_only_layers": [0, 4]},
    "llama4_text": {
        **SIZES,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
        "head_dim": 8,
    },
    "deepseek_v3": {
        **SIZES,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 3,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
FAST = ("llama", "gemma3_text", "gpt_neox", "gpt_oss", "opt", "phi")
CASES = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
SKIP = {0: ["attention"], 1: ["mlp"], 3: ["attention", "mlp"], 5: ["mlp"]}
KEPT = 4
PARTS = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "fc1", "fc2"),
}
BATCH = torch.stack([torch.arange(20) * 7 % 97, (torch.arange(20) * 3 + 5) % 97])
MASK = torch.ones_like(BATCH)
MASK[1, :6] = 0


def zeroed(family: str, kit: Any, skip: dict[int, list[str]] = SKIP, **options: Any) -> Any:
    """A random model, zero in what its config names as skipped."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **options})
    model = kit.random_model(config, torch.float32)
    for block, parts in skip.items():
        for part in parts:
            for name, module in find_blocks(model)[block].named_children():
                if name in PARTS[part]:
                    for parameter in module.parameters():
                        parameter.data.zero_()
    model.config.per_layer_config = {i: {"skip": parts} for i, parts in skip.items()}
    return model


@pytest.fixture
def pair(kit: Any) -> Callable[..., tuple[Any, Any]]:
    """The model with zeros, and the same with those parts taken out."""

    def make(family: str, **options: Any) -> tuple[Any, Any]:
        model = zeroed(family, kit, **options)
        return model, skip_sublayers(copy.deepcopy(model))

    return make


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def in_chunks(model: Any, cache: Any) -> torch.Tensor:
    """Logits of the padded batch, read in three pieces through a cache."""
    pieces = [
        model(
            BATCH[:, start:end],
            attention_mask=MASK[:, :end],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for start, end in ((0, 7), (7, 8), (8, 20))
    ]
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("family", CASES)
def test_every_way_to_run_it_gives_the_same_bits(
    family: str, pair: Callable[..., tuple[Any, Any]]
) -> None:
    model, skipped = pair(family)
    with torch.no_grad():
        for options in ({"use_cache": False}, {"attention_mask": MASK}):
            assert_same(skipped(BATCH, **options).logits, model(BATCH, **options).logits)
        whole = skipped(BATCH, attention_mask=MASK, use_cache=False).logits
        for make in (
            lambda: DynamicCache(),
            lambda: DynamicCache(config=model.config),
            lambda: StaticCache(config=model.config, max_cache_len=32),
        ):
            cache = make()
            logits = in_chunks(skipped, cache)
            assert_same(logits, in_chunks(model, make()))
            assert len(cache.layers) == KEPT
            assert all(layer.is_initialized for layer in cache.layers)
            if family != "gpt_neo" or isinstance(cache, DynamicCache):  # stock is wrong there too
                torch.testing.assert_close(logits[MASK.bool()], whole[MASK.bool()])
    usual = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    usual |= {"attention_mask": MASK, "output_logits": True, "return_dict_in_generate": True}
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        got, expected = (m.generate(BATCH, **usual, **options) for m in (skipped, model))
        assert torch.equal(got.sequences, expected.sequences)
        for one, other in zip(got.logits, expected.logits, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("family", CASES)
def test_saving_gives_the_zeros_back(
    family: str, pair: Callable[..., tuple[Any, Any]], kit: Any, tmp_path: Path
) -> None:
    model, skipped = pair(family)
    assert sum(p.numel() for p in skipped.parameters()) < sum(p.numel() for p in model.parameters())
    for m, name in ((model, "zeros"), (skipped, "skipped")):
        m.half().save_pretrained(tmp_path / name)
    kit.assert_same(kit.stored(tmp_path / "skipped"), kit.stored(tmp_path / "zeros"))
    configs = [checkpoint.open(tmp_path / name).config for name in ("zeros", "skipped")]
    assert configs[0] == configs[1]
    loaded = []
    for name in ("skipped", "zeros"):
        again, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        loaded.append(again)
    assert_same(kit.logits(skip_sublayers(loaded[0])), kit.logits(loaded[1]))
    skipped.load_state_dict(model.state_dict())


def test_layer_0_without_attention_is_no_trap(pair: Callable[..., tuple[Any, Any]]) -> None:
    """Unless the others move up, a cache takes its length from a layer that is never filled."""
    model, skipped = pair("llama", skip={0: ["attention"]})
    cache = DynamicCache()
    with torch.no_grad():
        skipped(BATCH[:, :12], past_key_values=cache)
        assert cache.get_seq_length() == 12
        assert len(cache.layers) == BLOCKS - 1
        continued = skipped(BATCH[:, 12:], past_key_values=cache).logits
        torch.testing.assert_close(continued, model(BATCH).logits[:, 12:])


def test_a_cache_that_the_whole_model_filled_is_taken_over(
    pair: Callable[..., tuple[Any, Any]],
) -> None:
    model, skipped = pair("gemma3_text")
    with torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(BATCH[:, :12], past_key_values=cache)
        expected = model(BATCH[:, 12:], past_key_values=caches[0]).logits
        assert_same(skipped(BATCH[:, 12:], past_key_values=caches[1]).logits, expected)


def test_norms_that_nobody_reads_do_not_run_and_are_kept(
    pair: Callable[..., tuple[Any, Any]],
) -> None:
    ran = []
    for family, idle, busy in (
        ("llama", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"),
        ("gemma3_text", "layers.0.post_attention_layernorm", "layers.0.pre_feedforward_layernorm"),
        ("phi", "layers.3.input_layernorm", "layers.0.input_layernorm"),
        ("opt", "decoder.layers.1.final_layer_norm", "decoder.layers.1.self_attn_layer_norm"),
    ):
        model, skipped = pair(family)
        for name in (idle, busy):
            norm = skipped.base_model.get_submodule(name)
            state = torch.randn(1, 32)
            ran.append(not torch.equal(norm(state), state))
        assert ran[-2:] == [False, True], family
        assert skipped.state_dict().keys() == model.state_dict().keys()


def test_nothing_to_skip_changes_nothing(pair: Callable[..., tuple[Any, Any]], kit: Any) -> None:
    plain = kit.random_model(kit.llama, torch.float32)
    before = copy.deepcopy(plain)
    assert skip_sublayers(plain) is plain
    assert repr(plain) == repr(before)
    _, once = pair("llama")
    text = repr(once)
    assert skip_sublayers(once) is once
    assert repr(once) == text
    assert len(find_blocks(once)[0]._forward_pre_hooks) == 1


def test_our_own_key_counts_too(kit: Any) -> None:
    model = zeroed("llama", kit)
    model.config.per_layer_config = {0: {"skip": ["attention"]}}
    model.config.entropress_skip = {"3": {"skip": ["attention", "mlp"]}}
    skipped = skip_sublayers(copy.deepcopy(model))
    assert [
        layer.self_attn.layer_idx
        for layer in skipped.model.layers
        if len(list(layer.self_attn.parameters()))
    ] == [0, 1, 2, 3]
    assert_same(kit.logits(skipped), kit.logits(model))


def test_a_copy_in_another_dtype_saves_in_that_dtype(
    pair: Callable[..., tuple[Any, Any]],
) -> None:
    _, skipped = pair("llama")
    assert {t.dtype for t in copy.deepcopy(skipped).bfloat16().state_dict().values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("what", ["parameter", "sign", "state dict", "adapter"])
def test_what_is_not_zero_is_not_skipped(
    what: str, pair: Callable[..., tuple[Any, Any]], kit: Any
) -> None:
    """Such as weights that transformers made up because the checkpoint has none."""
    if what in ("parameter", "sign"):
        model = zeroed("llama", kit)
        model.model.layers[3].mlp.up_proj.weight.data[0, 0] = 1e-30 if what == "parameter" else -0.0
        with pytest.raises(Corrupt, match=r"block 3, mlp.up_proj.weight: .*not zero"):
            skip_sublayers(model)
    elif what == "adapter":
        _, skipped = pair("llama")
        trained = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
        with pytest.raises(RuntimeError, match="lora_A.weight is skipped"):
            skipped.load_state_dict(trained, strict=False)
    else:
        model, skipped = pair("llama")
        model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = 1
        with pytest.raises(RuntimeError, match="self_attn.o_proj.weight is skipped"):
            skipped.load_state_dict(model.state_dict())


def bloom(kit: Any) -> Any:
    """Its attention adds the residual itself: zero weights are not nothing."""
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=4, n_head=4)
    model = kit.random_model(config, torch.float32)
    for parameter in model.transformer.h[1].self_attention.parameters():
        parameter.data.zero_()
    model.config.per_layer_config = {1: {"skip": ["attention"]}}
    return model


def changed(**fields: Any) -> Callable[[Any], Any]:
    def make(kit: Any) -> Any:
        model = zeroed("llama", kit)
        for name, value in fields.items():
            setattr(model.config, name, value)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bloom, "do more than to add"),
        (changed(entropress_skip={"1": {"skip": ["mpl"]}}), "unknown part.*did you mean 'mlp'"),
        (changed(entropress_skip={"6": {"skip": ["mlp"]}}), "not there, got 6"),
        (
            changed(entropress_skip={str(i): {"skip": ["attention"]} for i in range(BLOCKS)}),
            "attention of every block",
        ),
        (changed(num_kv_shared_layers=2), "num_kv_shared_layers"),
        (changed(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_models_that_are_refused(make: Callable[[Any], Any], reason: str, kit: Any) -> None:
    with pytest.raises(BadInput, match=reason):
        skip_sublayers(make(kit))


def test_offloaded_weights_are_refused(kit: Any) -> None:
    model = zeroed("llama", kit)
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(BadInput, match="offloaded, or spread over devices, got cpu, meta"):
        skip_sublayers(model)


def test_tensor_parallel_models_are_refused(kit: Any, tmp_path: Path) -> None:
    zeroed("llama", kit).save_pretrained(tmp_path)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        parallel = DistributedConfig(tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=parallel)
        with pytest.raises(BadInput, match="spread over devices"):
            skip_sublayers(model)
    finally:
        torch.distributed.destroy_process_group()


def anatomy(model: Any) -> list[Any]:
    """Every module with its attributes and numbers of hooks."""
    return [
        (
            *(name, type(module), sorted(vars(module)), getattr(module, "layer_idx", None)),
            *(len(module._forward_hooks), len(module._forward_pre_hooks)),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "bloom"])
def test_a_refused_model_is_as_it_was(family: str, kit: Any) -> None:
    model = bloom(kit) if family == "bloom" else zeroed(family, kit)
    hooks = []
    if family != "bloom":  # the last of its parts does more than its weights say
        names = PARTS["mlp"]
        [*_, part] = [m for n, m in find_blocks(model)[5].named_children() if n in names]
        hooks.append(part.register_forward_hook(lambda _, args, out: out + 1))
    before, expected = anatomy(model), kit.logits(model)
    with pytest.raises(BadInput, match="do more than to add"):
        skip_sublayers(model)
    assert anatomy(model) == before
    assert_same(kit.logits(model), expected)
    for hook in hooks:
        hook.remove()
        expected = kit.logits(model)
        assert_same(kit.logits(skip_sublayers(model)), expected)
        assert anatomy(model) != before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_as_the_whole_model_does(
    checkpointing: bool, pair: Callable[..., tuple[Any, Any]]
) -> None:
    """Zero weights behind zero weights have no gradient: the whole model keeps them as well."""
    models = pair("llama")
    for model in models:
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(BATCH, attention_mask=MASK, labels=BATCH).loss.backward()
            optimizer.step()
    whole, skipped = (model.state_dict() for model in models)
    assert whole.keys() == skipped.keys()
    for name, tensor in whole.items():
        assert_same(skipped[name], tensor)
    for name, parameter in models[1].named_parameters():
        idle = name == "model.layers.0.input_layernorm.weight" or "layers.3." in name
        idle |= name.endswith("post_attention_layernorm.weight") and name[13] in "15"
        assert (parameter.grad is None) == idle, name


def test_continuous_batching_is_refused(pair: Callable[..., tuple[Any, Any]]) -> None:
    _, skipped = pair("llama")
    with pytest.raises(BadInput, match="continuous batching"):
        skipped(BATCH, cache=object())
