"""A damaged, mixed-up or newer checkpoint never becomes a model with other weights."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import safetensors
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from compress.errors import BadInput, Corrupt
from compress.hf.quantizer import EntropressConfig

INDEX = "model.safetensors.index.json"
load = AutoModelForCausalLM.from_pretrained


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def read_shard(path):
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_shard(path, tensors):
    safetensors.torch.save_file(tensors, path, {"format": "pt", "entropress": "1"})


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def sampled_bits(path, count, seed):
    """Bits over the whole file, a third of them in its first 512 bytes."""
    draw = random.Random(seed)
    size = path.stat().st_size
    return [draw.randrange(8 * min(size, 512 if i % 3 == 0 else size)) for i in range(count)]


@pytest.mark.parametrize("which", ["shard", "index"])
def test_no_flipped_bit_changes_a_weight(which, llama, kit):
    coded = llama[1]
    expected = load(coded).state_dict()
    files = sorted(coded.glob("*.safetensors")) if which == "shard" else [coded / INDEX]
    assert len(files) == (3 if which == "shard" else 1)
    caught = 0
    for number, file in enumerate(files):
        original = file.read_bytes()
        for bit in sampled_bits(file, 60 // len(files), seed=number):
            flip(file, bit)
            try:
                loaded = load(coded)
            except Exception:
                caught += 1
            else:  # as in the index's total_size or the shards' format
                kit.assert_same(loaded.state_dict(), expected)
            file.write_bytes(original)
    assert caught > (50 if which == "shard" else 40)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
def test_corrupt_data_names_file_and_tensor(where, llama):
    coded = llama[1]
    shard = sorted(coded.glob("*.safetensors"))[1]
    start = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    flip(shard, 8 * int(start + where * (shard.stat().st_size - start)))
    with pytest.raises(Corrupt, match=rf"{shard.name}.*model\.\S+weight"):
        load(coded)


def test_truncated_shard(llama):
    shard = next(llama[1].glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(Corrupt, match=shard.name):
        load(llama[1])


def test_tensors_under_each_others_names(llama):
    """Equal shapes and valid checksums: only the name in the coded header tells."""
    coded = llama[1]
    shard = coded / json.loads((coded / INDEX).read_text())["weight_map"]["model.norm.weight"]
    tensors = read_shard(shard)
    norm = "model.layers.1.input_layernorm.weight"
    tensors["model.norm.weight"], tensors[norm] = tensors[norm], tensors["model.norm.weight"]
    write_shard(shard, tensors)
    with pytest.raises(Corrupt, match=rf"{shard.name}.*norm"):
        load(coded)


def test_a_dense_tensor_among_the_coded(llama):
    coded = llama[1]
    shard = next(coded.glob("*.safetensors"))
    tensors = read_shard(shard)
    name = next(iter(tensors))
    write_shard(shard, tensors | {name: torch.zeros(4, 4)})
    with pytest.raises(Corrupt, match=f"{shard.name}.*{name}"):
        load(coded)


def test_a_tensor_left_out_of_shard_and_index(llama):
    coded = llama[1]
    shard = next(coded.glob("*.safetensors"))
    tensors = read_shard(shard)
    name, _ = tensors.popitem()
    write_shard(shard, tensors)
    edit(coded / INDEX, lambda index: index["weight_map"].pop(name))
    with pytest.raises(Corrupt, match=r"config\.json"):
        load(coded)


def test_index_and_shards_disagree(llama):
    coded = llama[1]

    def swap(index):
        names = iter(index["weight_map"].items())
        name, file = next(names)
        index["weight_map"][name] = next(other for _, other in names if other != file)

    edit(coded / INDEX, swap)
    with pytest.raises(Corrupt, match="tensor"):
        load(coded)


def test_a_missing_shard(llama):
    next(llama[1].glob("*.safetensors")).unlink()
    with pytest.raises((Corrupt, OSError)):
        load(llama[1])


def test_files_that_are_not_the_checkpoint(llama):
    """Transformers is told to load one shard only."""
    coded = llama[1]
    one = next(coded.glob("*.safetensors")).name
    edit(coded / "config.json", lambda config: config.update(transformers_weights=one))
    with pytest.raises(Corrupt, match=one):
        load(coded)


def test_newer_format_asks_to_upgrade(llama):
    edit(
        llama[1] / "config.json",
        lambda config: config["quantization_config"].update(min_reader=999, novelty=[1]),
    )
    with pytest.raises(BadInput, match="upgrade"):
        load(llama[1])


def test_tensor_parallel_loading_is_refused(llama):
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(BadInput, match="decompress"):
            load(llama[1], distributed_config=DistributedConfig(tp_size=2))
    finally:
        torch.distributed.destroy_process_group()


def test_a_dense_model_cannot_be_coded_by_a_config(llama):
    with pytest.raises(BadInput, match="entropress compress"):
        load(llama[0], quantization_config=EntropressConfig())


def test_a_directory_of_dense_shards_that_claims_to_be_coded(llama):
    dense, coded = llama
    shutil.copy(coded / "config.json", dense / "config.json")
    with pytest.raises(Corrupt):
        load(dense)
