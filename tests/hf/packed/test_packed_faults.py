"""What cannot be packed, or is damaged, is refused in one line before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from compress.errors import BadInput, Corrupt, EntropressError, Missing
from compress.hf.packed import forms
from compress.hf.quantizer import EntropressConfig

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def packed(directory: Path, form: str = "auto", **options: Any) -> Any:
    config = EntropressConfig(packed=form)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, **options)


@pytest.fixture
def coded(kit: Any, tmp_path: Path) -> Path:
    model = kit.random_model(transformers.LlamaConfig(**CONFIG), torch.bfloat16)
    model.save_pretrained(tmp_path / "dense", max_shard_size="80KB")
    return kit.encode(tmp_path / "dense", tmp_path / "coded")


def one_line(error: pytest.ExceptionInfo[EntropressError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", ["stored", "fast"])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
def test_a_corrupt_shard_names_file_and_tensor(where, form, coded):
    shard = sorted(coded.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[int(start + where * (len(data) - start))] ^= 4
    shard.write_bytes(data)
    with pytest.raises(Corrupt, match=rf"{shard.name}.*model\.\S+weight") as error:
        packed(coded, form)
    one_line(error)


def test_a_newer_format(coded):
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"]["min_reader"] = 9
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="reads format 9.*upgrade") as error:
        packed(coded)
    one_line(error)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"packed": "fats"}, "unknown packed, got 'fats'; did you mean 'fast'"),
        ({"packed": "df11"}, "known: auto, dense, fast, stored"),
        ({"packed": None}, "unknown packed"),
        ({"packed": "auto", "exact": "logit"}, "unknown exact, got 'logit'; did you mean 'logits'"),
        ({"pakced": "auto"}, "unknown option, got 'pakced'; did you mean 'packed'"),
        ({"packed": "auto", "bits": 4}, "unknown option, got 'bits'; known: exact, packed, skip"),
    ],
)
def test_unknown_words(options, hint):
    with pytest.raises(BadInput, match=hint) as error:
        EntropressConfig(**options)
    one_line(error)


def test_a_dtype_of_which_nothing_can_be_packed(coded):
    with pytest.raises(
        BadInput, match="only 16-bit floats.*got float32.*dtype='bfloat16'"
    ) as error:
        packed(coded, dtype=torch.float32)
    one_line(error)


@pytest.mark.parametrize(
    ("device_map", "form", "hint"),
    [
        ({"model": 0, "lm_head": "cpu"}, "auto", "not offloaded"),
        ({"model": "cpu", "lm_head": "disk"}, "auto", "got disk"),
        ("mps", "auto", "got mps"),
        ("cuda", "stored", "packed='stored' is decoded by the CPU"),
    ],
)
def test_places_where_packed_weights_cannot_be(device_map, form, hint, coded):
    with pytest.raises(BadInput, match=hint) as error:
        packed(coded, form, device_map=device_map)
    one_line(error)


@pytest.mark.parametrize("device_map", ["cuda", 0, {"": "cuda:1"}])
def test_a_gpu_where_there_is_none(device_map, coded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Missing, match="no CUDA device.*the CPU decodes as well") as error:
        packed(coded, device_map=device_map)
    one_line(error)


def test_tied_weights_on_two_devices(kit, tmp_path, monkeypatch):
    config = transformers.LlamaConfig(**CONFIG, tie_word_embeddings=True)
    kit.random_model(config, torch.bfloat16).save_pretrained(tmp_path / "dense")
    coded = kit.encode(tmp_path / "dense", tmp_path / "coded")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BadInput, match="lm_head.weight on 1") as error:
        packed(coded, device_map={"model": 0, "lm_head": 1})
    one_line(error)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_says_what_was_needed(error, coded, monkeypatch):
    calls = []

    def fail(*args: Any, **options: Any) -> None:
        calls.append(args)
        raise error

    monkeypatch.setattr(forms, "pack", fail)
    with pytest.raises(Missing, match=r"not enough memory.*about \d{3},\d{3} bytes") as raised:
        packed(coded, "fast")
    one_line(raised)
    assert len(calls) == 1  # nothing is tried after it


def test_what_fails_in_packing_is_raised_as_it_is(coded, monkeypatch):
    def fail(*args: Any, **options: Any) -> None:
        raise Corrupt("does not unpack to what was packed")

    monkeypatch.setattr(forms, "pack", fail)
    with pytest.raises(Corrupt, match="does not unpack"):
        packed(coded, "dense")


def test_tensor_parallel_loading_is_refused_packed_too(coded):
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(BadInput, match="decompress"):
            packed(coded, distributed_config=DistributedConfig(tp_size=2))
    finally:
        torch.distributed.destroy_process_group()


def test_a_damaged_load_leaves_the_next_one_whole(coded, kit):
    shard = sorted(coded.glob("*.safetensors"))[0]
    good = shard.read_bytes()
    shard.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    with pytest.raises(Corrupt):
        packed(coded)
    shard.write_bytes(good)
    dense = AutoModelForCausalLM.from_pretrained(coded.parent / "dense")
    assert torch.equal(kit.integers(kit.logits(packed(coded))), kit.integers(kit.logits(dense)))


def test_a_quantized_model_is_not_packed(coded):
    """transformers itself refuses, for what is loaded has a config of another class."""
    config = json.loads((coded / "config.json").read_text())
    quantized = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config["quantization_config"]["quantization_config"] = quantized
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="CompressedTensorsConfig but .* EntropressConfig"
    ) as error:
        packed(coded)
    assert "\n" not in str(error.value)


def test_it_is_not_unpacked_in_place(coded):
    with pytest.raises(BadInput, match="not unpacked in place; load it without") as error:
        packed(coded).dequantize()
    one_line(error)
