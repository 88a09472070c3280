"""Which directories are models, and what each wrong one is told."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress import checkpoint
from compress.errors import BadInput, Corrupt

ONE = {"a": np.zeros(2, np.float32)}
TWO = {"b": np.ones(3, np.float32)}


def test_single_file(make_model):
    opened = checkpoint.open(make_model(ONE))
    assert opened.files == ["model.safetensors"]
    assert opened.source.id == "model"


def test_index(make_model):
    opened = checkpoint.open(str(make_model(ONE, TWO)))
    assert opened.files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert list(opened.tensor_infos()) == ["a", "b"]


def test_a_set_without_index_and_an_odd_name(make_model):
    sharded = make_model(ONE, TWO, name="sharded")
    (sharded / "model.safetensors.index.json").unlink()
    assert len(checkpoint.open(sharded).files) == 2
    odd = make_model(ONE, name="odd")
    (odd / "model.safetensors").rename(odd / "weights.safetensors")
    assert checkpoint.open(odd).files == ["weights.safetensors"]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_missing_shard_is_named(make_model, indexed, part):
    directory = make_model(ONE, TWO, {"c": np.zeros(1, np.int8)})
    file = f"model-0000{part}-of-00003.safetensors"
    (directory / file).unlink()
    if not indexed:
        (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(Corrupt, match=f"{file}: the shard is missing"):
        checkpoint.open(directory)


def test_no_model(tmp_path, make_model):
    with pytest.raises(BadInput, match="no such directory"):
        checkpoint.open(tmp_path / "nowhere")
    directory = make_model(ONE)
    with pytest.raises(BadInput, match="not a directory"):
        checkpoint.open(directory / "config.json")
    (directory / "config.json").unlink()
    with pytest.raises(BadInput, match=r"no config\.json"):
        checkpoint.open(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"no \*\.safetensors"):
        checkpoint.open(directory)
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(BadInput, match=r"pytorch_model\.bin.*safe_serialization=True"):
        checkpoint.open(directory)


def test_unrelated_files_without_an_index(make_model):
    directory = make_model(ONE)
    (directory / "model.safetensors").rename(directory / "x.safetensors")
    save_file(TWO, directory / "y.safetensors")
    with pytest.raises(BadInput, match="several safetensors files"):
        checkpoint.open(directory)


@pytest.mark.parametrize("config", ["[]", "{", "", '{"a": 1, "a": 2}', "\ufeff{}"])
def test_a_broken_config(make_model, config):
    directory = make_model(ONE)
    (directory / "config.json").write_text(config)
    with pytest.raises(Corrupt, match=r"config\.json"):
        checkpoint.open(directory)


@pytest.mark.parametrize(
    "file",
    [
        "../model/model-00001-of-00002.safetensors",
        "/etc/passwd.safetensors",
        "sub/x.safetensors",
        "sub\\x.safetensors",
        "..",
        ".safetensors",
        "x\0.safetensors",
        "config.json",
        "",
        1,
        None,
        ["model-00001-of-00002.safetensors"],
    ],
)
def test_an_index_that_points_elsewhere(make_model, file):
    directory = make_model(ONE, TWO)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {"a": file}}))
    with pytest.raises(Corrupt, match=r"index\.json: weight_map must name plain"):
        checkpoint.open(directory)


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": FIRST}, "'b': is not in " + FIRST),
        ({"a": FIRST, "b": SECOND, "c": SECOND}, "'c': is not in " + SECOND),
        ({"a": SECOND, "b": SECOND}, "'a': is not in " + SECOND),
        ({"a": FIRST, "c": SECOND}, "'b': is not in the index"),
        ({}, "weight_map is missing or empty"),
        ([], "weight_map is missing or empty"),
    ],
)
def test_an_index_that_disagrees_with_the_shards(make_model, weight_map, message):
    directory = make_model(ONE, TWO)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(Corrupt, match=message):
        checkpoint.open(directory)


def test_a_tensor_in_two_shards(make_model):
    directory = make_model(ONE | {"c": ONE["a"]}, ONE | TWO)
    with pytest.raises(Corrupt, match="'a': is also in model-00001"):
        checkpoint.open(directory)


def test_sidecars(make_model):
    directory = make_model(ONE)
    keep = [
        "LICENSE",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "spiece.model",
        "tokenizer.json",
        "1_Pooling/config.json",
    ]
    drop = [
        ".cache/huggingface/x.json",
        ".git/config",
        ".gitattributes",
        ".hidden",
        "checkpoint-500/trainer_state.json",
        "consolidated.safetensors",
        "entropress.json",
        "flax_model.msgpack",
        "model.Q4.gguf",
        "onnx/config.json",
        "original/params.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "rng_state.pth",
        "tf_model.h5",
        "training_args.bin",
    ]
    for path in keep + drop:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).touch()
    assert sorted(checkpoint.open(directory).sidecars()) == sorted(keep)


def test_links(tmp_path, make_model):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "notes.txt").touch()
    directory = make_model(ONE)
    (directory / "notes.txt").symlink_to(secret / "notes.txt")
    (directory / "folder").symlink_to(secret)
    (directory / "broken.txt").symlink_to("nowhere")
    (directory / "inside.json").symlink_to("tokenizer.json")
    os.mkfifo(directory / "pipe.txt")
    assert checkpoint.open(directory).sidecars() == ["inside.json", "tokenizer.json"]
    (directory / "model.safetensors").rename(secret / "model.safetensors")
    (directory / "model.safetensors").symlink_to(secret / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.safetensors: is a link that leaves"):
        checkpoint.open(directory)


def test_a_hub_snapshot_of_links_into_blobs(make_model, tmp_path):
    directory = make_model(ONE)
    repo = tmp_path / "hub/models--org--name"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots/0123"
    snapshot.mkdir(parents=True)
    for i, path in enumerate(directory.iterdir()):
        path.rename(repo / f"blobs/{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    opened = checkpoint.open(snapshot)
    assert opened.sidecars() == ["tokenizer.json"]
    assert b"".join(map(bytes, opened.chunks("a"))) == bytes(8)
