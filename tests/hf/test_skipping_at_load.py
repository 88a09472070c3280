"""A coded checkpoint is loaded without what its config names as skipped, where that is possible."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from compress import checkpoint
from compress.errors import BadInput
from compress.hf.quantizer import EntropressConfig
from compress.prune import drop_sublayers

ATTENTION, MLP = (0, 2, 5), (1, 2)
BLOCKS = 6
BATCH = torch.stack([torch.arange(20) * 7 % 90, (torch.arange(20) * 3 + 5) % 90])
MASK = torch.ones_like(BATCH)
MASK[1, :6] = 0
load = AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def saved(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama with dropped sublayers: its dense directory, in several shards, and its coded one."""
    directory = tmp_path_factory.mktemp("skipping")
    config = transformers.LlamaConfig(**kit.llama.to_dict() | {"num_hidden_layers": BLOCKS})
    model = kit.random_model(config, torch.float32)
    model.save_pretrained(directory / "whole", max_shard_size="60KB")
    drop_sublayers(checkpoint.open(directory / "whole"), ATTENTION, MLP, directory / "dense")
    return directory / "dense", kit.encode(directory / "dense", directory / "coded")


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is said in transformers' log about skipping."""
    said: list[str] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: record.name == "transformers.entropress")
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield said
    logging.getLogger("transformers").removeHandler(handler)


def size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def test_it_computes_what_the_zeros_do(saved: tuple[Path, Path], warnings: list[str]) -> None:
    zeros, skipped = map(load, saved)
    assert not warnings
    layer = zeros.model.layers[0]
    dropped = len(ATTENTION) * size(layer.self_attn) + len(MLP) * size(layer.mlp)
    assert size(skipped) == size(zeros) - dropped
    with torch.no_grad():
        for options in ({}, {"attention_mask": MASK}, {"use_cache": False}):
            assert_same(skipped(BATCH, **options).logits, zeros(BATCH, **options).logits)
        caches = DynamicCache(), DynamicCache(config=skipped.config)
        for start, end in ((0, 7), (7, 8), (8, 20)):
            chunk = {"input_ids": BATCH[:, start:end], "attention_mask": MASK[:, :end]}
            expected, got = (
                model(**chunk, past_key_values=cache).logits
                for model, cache in zip((zeros, skipped), caches, strict=True)
            )
            assert_same(got, expected)
            assert caches[1].get_seq_length() == end
        assert len(caches[1].layers) == BLOCKS - len(ATTENTION)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"use_cache": False, "do_sample": False},
        {"cache_implementation": "static", "disable_compile": True, "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ],
    ids=["greedy", "beams", "sampled", "no cache", "static cache", "prompt lookup"],
)
def test_it_generates_what_the_zeros_do(options: dict[str, Any], saved: tuple[Path, Path]) -> None:
    rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
    usual = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    usual |= {"attention_mask": MASK[rows], "return_dict_in_generate": True, "output_logits": True}
    outputs = []
    for model in map(load, saved):
        for _ in range(2):  # the second time with what the first has left behind
            torch.manual_seed(0)
            outputs.append(model.generate(BATCH[rows], **usual, **options))
    for output in outputs[1:]:
        assert torch.equal(output.sequences, outputs[0].sequences)
        for got, expected in zip(output.logits, outputs[0].logits, strict=True):
            assert_same(got, expected)


def test_saved_again_it_is_the_dense_checkpoint(
    saved: tuple[Path, Path], kit: Any, tmp_path: Path
) -> None:
    dense, coded = saved
    load(coded).save_pretrained(tmp_path)
    kit.assert_same(kit.stored(tmp_path), kit.stored(dense))
    written, given = (checkpoint.open(path).config for path in (tmp_path, dense))
    assert written["per_layer_config"] == given["per_layer_config"]
    assert_same(kit.logits(load(tmp_path)), kit.logits(load(dense)))
    assert repr(load(tmp_path)) == repr(load(dense))  # plain transformers takes nothing out


def test_loading_draws_no_random_numbers(saved: tuple[Path, Path]) -> None:
    torch.manual_seed(0)
    load(saved[1])
    drawn = torch.rand(4)
    torch.manual_seed(0)
    load(saved[0])
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_whoever_asks_gets_the_whole_model(saved: tuple[Path, Path], kit: Any) -> None:
    dense, coded = saved
    whole = load(coded, quantization_config=EntropressConfig(skip=False))
    assert repr(whole) == repr(load(dense))
    assert not hasattr(whole.config, "quantization_config")
    kit.assert_same(whole.state_dict(), load(dense).state_dict())
    assert size(load(coded, quantization_config=EntropressConfig())) < size(whole)


def test_a_base_model_skips_too(saved: tuple[Path, Path], kit: Any) -> None:
    zeros, skipped = map(AutoModel.from_pretrained, saved)
    assert size(skipped) < size(zeros)
    assert_same(kit.logits(skipped), kit.logits(zeros))


def test_an_adapter_for_what_is_skipped_is_refused(
    saved: tuple[Path, Path], kit: Any, tmp_path: Path
) -> None:
    """One that was trained on the whole model; one that was trained on this model fits both."""
    peft = pytest.importorskip("peft")
    for place, model in zip(("whole", "skipped"), map(load, saved), strict=True):
        torch.manual_seed(0)
        options = {"target_modules": "all-linear", "init_lora_weights": False}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        adapted.save_pretrained(tmp_path / place)
    with pytest.raises(BadInput, match=r"self_attn.*: has weights for what is skipped; .*skip=Fal"):
        load(saved[1]).load_adapter(str(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match=r"lora_A.weight is skipped .*skip=False"):
        peft.PeftModel.from_pretrained(load(saved[1]), tmp_path / "whole")
    skipped = load(saved[1])
    skipped.load_adapter(str(tmp_path / "skipped"))
    assert_same(kit.logits(skipped), kit.logits(adapted))


def state_the_skip(directory: Path, skip: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"entropress_skip": skip}))


def adds_itself(directory: Path, kit: Any) -> dict[str, Any]:
    """A Bloom's attention adds the residual: without it, even a zero one, all is lost."""
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4)
    model = kit.random_model(config, torch.float32)
    for parameter in model.transformer.h[1].self_attention.parameters():
        parameter.data.zero_()
    model.save_pretrained(directory)
    state_the_skip(directory, {"1": {"skip": ["attention"]}})
    return {}


def not_zero(directory: Path, kit: Any) -> dict[str, Any]:
    kit.random_model(kit.llama, torch.float32).save_pretrained(directory)
    state_the_skip(directory, {"1": {"skip": ["mlp"]}})
    return {}


def reads_no_tokens(directory: Path, kit: Any) -> dict[str, Any]:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    kit.random_model(config, torch.float32, base=True).save_pretrained(directory)
    state_the_skip(directory, {"1": {"skip": ["attention"]}})
    return {}


def nonsense(directory: Path, kit: Any) -> dict[str, Any]:
    kit.random_model(kit.llama, torch.float32).save_pretrained(directory)
    state_the_skip(directory, {"one": 1})
    return {}


def offloaded(directory: Path, kit: Any) -> dict[str, Any]:
    model = kit.random_model(kit.llama, torch.float32)
    for parameter in model.model.layers[0].self_attn.parameters():
        parameter.data.zero_()
    model.save_pretrained(directory)
    state_the_skip(directory, {"0": {"skip": ["attention"]}})
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), "cpu")
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "disk")
    return {"device_map": places, "offload_folder": directory.with_name("offload")}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (adds_itself, "do more than to add"),
        (not_zero, "block 1, mlp.* not zero"),
        (reads_no_tokens, ""),
        (nonsense, ""),
        (offloaded, "offloaded, or spread over devices"),
    ],
)
def test_what_cannot_be_skipped_is_loaded_whole(
    make: Callable[[Path, Any], dict[str, Any]],
    reason: str,
    kit: Any,
    tmp_path: Path,
    warnings: list[str],
) -> None:
    options = make(tmp_path / "dense", kit)
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    auto = AutoModel if make is reads_no_tokens else AutoModelForCausalLM
    model = auto.from_pretrained(coded, **options)
    [warning] = warnings
    assert re.match(f"what config.json names .* computed all the same: .*{reason}", warning)
    whole = auto.from_pretrained(tmp_path / "dense", **options)
    assert repr(model) == repr(whole)
    if make is not reads_no_tokens:
        assert_same(kit.logits(model), kit.logits(whole))
