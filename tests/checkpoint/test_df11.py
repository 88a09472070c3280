"""Directories that dfloat11 wrote, read as the dense models they were made from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress import checkpoint, pipeline
from compress.checkpoint import NewTensor
from compress.codec import df11
from compress.errors import BadInput, Corrupt

DATA = Path(__file__).resolve().parent.parent / "data" / "df11"
GOLDEN = json.loads((DATA / "sha256.json").read_text())
KEY = "dfloat11_config"


@pytest.fixture
def copied(tmp_path) -> Path:
    """The untied model, to be spoilt."""
    return Path(shutil.copytree(DATA / "untied", tmp_path / "model"))


@pytest.fixture
def reconfigure(copied):
    """Change the config, or its part about DFloat11, by what a function does to it."""

    def change(edit) -> Path:
        config = json.loads((copied / "config.json").read_text())
        edit(config)
        (copied / "config.json").write_text(json.dumps(config))
        return copied

    return change


def rewritten(directory: Path, file: str, edit) -> Path:
    """A shard with other tensors."""
    with safe_open(directory / file, "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    edit(tensors)
    save_file(tensors, directory / file)
    return directory


@pytest.mark.parametrize("model", ["untied", "tied"])
@pytest.mark.parametrize("backend", ["native", "fallback"])
def test_every_tensor_of_the_original(model, backend, monkeypatch):
    if backend == "fallback":
        monkeypatch.setenv("ENTROPRESS_BACKEND", backend)
    opened = checkpoint.open(DATA / model)
    infos = opened.tensor_infos()
    # dfloat11 stores a tied head again, beside the embedding's unit.
    assert infos.keys() - GOLDEN[model].keys() == ({"lm_head.weight"} if model == "tied" else set())
    for name, (shape, sha256) in GOLDEN[model].items():
        assert (infos[name].dtype, infos[name].shape, infos[name].coded) == (
            ("BF16", tuple(shape), False)
        )
        tensor = opened.read(name)
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == infos[name].shape
        assert hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest() == sha256
        pieces = [bytes(piece) for piece in opened.chunks(name, 1000)]
        assert hashlib.sha256(b"".join(pieces)).hexdigest() == sha256
        assert max(map(len, pieces)) <= 1000


def test_it_looks_dense(copied):
    opened = checkpoint.open(copied)
    assert KEY not in opened.config
    assert not opened.coded
    infos = opened.tensor_infos().values()
    assert [info.file for info in infos] == sorted(info.file for info in infos)
    stored = sum(info.stored_nbytes for info in infos)
    files = sum((copied / file).stat().st_size for file in opened.files)
    assert 0.9 * files < stored < files < sum(info.nbytes for info in infos)
    before = opened.fingerprint
    with (copied / "model.safetensors").open("r+b") as shard:
        shard.seek(-1, 2)
        shard.write(b"\0")
    assert checkpoint.open(copied).fingerprint != before


def test_a_read_tensor_is_ones_own():
    opened = checkpoint.open(DATA / "untied")
    opened.read("lm_head.weight").zero_()
    assert opened.read("lm_head.weight").any()


def test_a_unit_is_decoded_once_for_all_its_weights(monkeypatch):
    decoded = []
    real = df11.decode_unit
    monkeypatch.setattr(df11, "decode_unit", lambda *given: decoded.append(1) or real(*given))
    opened = checkpoint.open(DATA / "untied")
    for name in opened.tensor_infos():
        opened.read(name)
    assert len(decoded) == 4
    with pytest.raises(BadInput, match="is stored in a unit with others"):
        opened.stored("lm_head.weight")
    assert opened.stored("model.norm.weight")[0] == "model.safetensors"


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_it_loads_and_compresses_as_any_model(model, tmp_path):
    from transformers import LlamaForCausalLM

    source = checkpoint.open(DATA / model)
    result = pipeline.run("lossless.yaml", DATA / model, tmp_path / "out")
    assert KEY not in json.loads((tmp_path / "out" / "config.json").read_text())
    for name, (shape, sha256) in GOLDEN[model].items():
        record = result.manifest["tensors"][name]
        assert (record["shape"], record["sha256"]) == (shape, sha256)
    direct, plain = source.load_model(), LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert direct.generation_config.eos_token_id == plain.generation_config.eos_token_id == 2
    assert not hasattr(direct.config, KEY)
    assert direct.state_dict().keys() == plain.state_dict().keys()
    for name, weight in direct.state_dict().items():
        assert torch.equal(weight.view(torch.int16), plain.state_dict()[name].view(torch.int16))
        if name in GOLDEN[model]:
            found = hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes())
            assert found.hexdigest() == GOLDEN[model][name][1]


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("version", "0.9.0", BadInput, r"unknown version, got '0\.9\.0', expected 0\.2 to 0\.5"),
        ("version", None, BadInput, "unknown version"),
        ("threads_per_block", [256], BadInput, "unknown threads_per_block, got"),
        ("bytes_per_thread", 4, BadInput, "unknown bytes_per_thread, got 4, expected 8"),
        ("pattern_dict", {"a": "b"}, Corrupt, "must map text to lists of text"),
        ("pattern_dict", {"(": []}, Corrupt, "not a pattern"),
        ("pattern_dict", {"(a+)+b": []}, BadInput, "too long or too slow"),
        ("pattern_dict", {".*.*.*.*": []}, BadInput, "too long or too slow"),
        ("pattern_dict", {"a{99}": []}, BadInput, "too long or too slow"),
    ],
)
def test_settings_that_are_not_known(reconfigure, key, value, error, message):
    directory = reconfigure(lambda config: config[KEY].update({key: value}))
    with pytest.raises(error, match=message):
        checkpoint.open(directory)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda c: c.pop("model_type"), BadInput, "names no architecture of transformers"),
        (lambda c: c.update(model_type="nosuch"), BadInput, "transformers cannot build"),
        (lambda c: c.update(hidden_size="x"), BadInput, "cannot build .* 'hidden_size'"),
        (lambda c: c.update(num_attention_heads=5), BadInput, "cannot build .* heads"),
        (lambda c: c.update(num_hidden_layers=3), Corrupt, "'model.layers.2': the unit is missing"),
        (lambda c: c.update(hidden_size=64), BadInput, "other weights than the architecture"),
        (lambda c: c.update(num_hidden_layers=1), BadInput, "no such module in the architecture"),
        (lambda c: c[KEY]["pattern_dict"].pop("lm_head"), Corrupt, "no pattern of pattern_dict"),
        (
            lambda c: c[KEY]["pattern_dict"][r"model\.layers\.\d+"].reverse(),
            Corrupt,
            "split_positions cut the weights elsewhere",
        ),
    ],
)
def test_an_architecture_that_does_not_fit(reconfigure, edit, error, message):
    directory = reconfigure(edit)
    with pytest.raises(error, match=message) as raised:
        checkpoint.open(directory).tensor_infos()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model_layers_1.safetensors", "'model.layers.1': the unit is missing; download all files"),
        ("lm_head.safetensors", "'lm_head': the unit is missing; download all files"),
        ("model.safetensors", "no model.safetensors, which holds the rest; download all files"),
    ],
)
def test_a_file_that_was_not_downloaded(copied, file, message):
    (copied / file).unlink()
    with pytest.raises(Corrupt, match=message):
        checkpoint.open(copied).tensor_infos()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("lm_head.luts"), "tensor 'lm_head': the unit has no luts"),
        (
            lambda t: t.update({"lm_head.gaps": t["lm_head.gaps"].view(torch.int8)}),
            r"'lm_head\.gaps': has the wrong dtype or shape",
        ),
        (
            lambda t: t.update({"lm_head.output_positions": torch.zeros(7, dtype=torch.uint8)}),
            "output_positions of odd size",
        ),
        (lambda t: t.update({"lm_head.weight": torch.zeros(1)}), "is stored twice"),
    ],
)
def test_units_that_are_not_whole(copied, edit, message):
    with pytest.raises(Corrupt, match=message):
        checkpoint.open(rewritten(copied, "lm_head.safetensors", edit)).tensor_infos()


def test_any_damage_is_an_error_or_other_weights_never_a_crash(copied):
    """Fuzzing the file: there is no checksum in it, but codes and gaps must go together."""
    file = copied / "model_layers_0.safetensors"
    whole, rng, found = file.read_bytes(), np.random.default_rng(1), 0
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.2:
            del data[rng.integers(len(data)) :]
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.write_bytes(data)
        try:
            opened = checkpoint.open(copied)
            for name in opened.tensor_infos():
                opened.read(name)
        except Corrupt as error:
            found += 1
            assert "model_layers_0" in str(error) or "tensor" in str(error)
    assert found > 15


def test_a_copy_says_nothing_of_dfloat11(tmp_path):
    source = checkpoint.open(DATA / "untied")
    copy, _ = checkpoint.rewrite(
        source,
        tmp_path / "copy",
        lambda info: [NewTensor(info.name, info.dtype, info.shape, source.chunks(info.name))],
    )
    assert copy.config == source.config
    assert KEY not in json.loads((tmp_path / "copy" / "config.json").read_text())
    for name in source.tensor_infos():
        assert torch.equal(copy.read(name).view(torch.int16), source.read(name).view(torch.int16))
