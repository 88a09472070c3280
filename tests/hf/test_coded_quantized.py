"""A compressed-tensors checkpoint that was coded loads, verifies and decodes as what it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers import auto
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

import compress.hf  # noqa: F401, registers the quantizer
from compress import checkpoint as room
from compress import pipeline
from compress.errors import BadInput, Corrupt
from compress.evaluate import inspect, verify
from compress.hf import count_weights
from compress.quant.export import export_quantized
from compress.quant.layers import linear_names
from compress.quant.qtensor import Scheme
from compress.quant.rtn import quantize_rtn

REPOSITORY = Path(__file__).parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "packed": {"schemes": [Scheme(4, 16, True)]},
    "whole": {"schemes": [Scheme(5, None, False)]},
    "mixed": {"schemes": [Scheme(3, 32, True), Scheme(8, None, True), Scheme(4, 16, False)]},
    "w8a8": {"schemes": [Scheme(8, None, True)], "activations": 8},
    "tied": {"schemes": [Scheme(6, None, True)], "tied": True},
}


def save_quantized(
    dense: Path, directory: Path, schemes: list[Scheme], activations: Any = None
) -> Path:
    source = room.open(dense)
    linears = linear_names(source)
    names = [name for name in linears.weights if name != "lm_head.weight"]
    chosen = {name: schemes[i % len(schemes)] for i, name in enumerate(names)}
    export_quantized(
        source,
        chosen,
        lambda name: quantize_rtn(source.read(name), chosen[name], torch.bfloat16),
        directory,
        activations=activations,
        skipped=linears.skipped | {"lm_head.weight": "the head"},
    )
    return directory


@pytest.fixture(scope="module")
def checkpoints(
    make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """By kind the compressed-tensors checkpoint and the coded one. Read-only."""
    root = tmp_path_factory.mktemp("quantized")
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96, "shard": "60KB"}
    dense = {
        tied: make_llama(root / f"tied-{tied}", tie_word_embeddings=tied, **sizes)
        for tied in (False, True)
    }
    made = {}
    for kind, options in KINDS.items():
        wanted = dict(options)
        plain = save_quantized(dense[wanted.pop("tied", False)], root / kind, **wanted)
        pipeline.run("lossless.yaml", plain, root / f"{kind}-coded")
        made[kind] = plain, root / f"{kind}-coded"
    return made


@pytest.fixture
def mixed(checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    """Those of several schemes, the coded one a copy to spoil."""
    plain, coded = checkpoints["mixed"]
    return plain, Path(shutil.copytree(coded, tmp_path / "coded"))


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def contents_of(directory: Path) -> dict[str, Any]:
    """Every tensor's dtype and bytes, and the config."""
    opened = room.open(directory)
    tensors = {
        name: (info.dtype, info.shape, b"".join(bytes(chunk) for chunk in opened.chunks(name)))
        for name, info in opened.tensor_infos().items()
    }
    return {"tensors": tensors, "config": opened.config}


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_runs_and_saves_like_the_checkpoint_before_coding(
    kind: str, checkpoints: dict[str, tuple[Path, Path]], kit: Any, tmp_path: Path
) -> None:
    plain, coded = checkpoints[kind]
    model, info = load(coded, output_loading_info=True)
    expected = load(plain)

    assert not any(info.values()), info
    kit.assert_same(model.state_dict(), expected.state_dict())
    assert repr(model) == repr(expected)
    assert isinstance(model.hf_quantizer, CompressedTensorsHfQuantizer)
    assert type(model.config.quantization_config) is CompressedTensorsConfig
    assert (
        vars(model.config.quantization_config).keys()
        == vars(expected.config.quantization_config).keys()
    )
    nameless = {"_name_or_path": None}
    assert model.config.to_dict() | nameless == expected.config.to_dict() | nameless
    for attribute in ("is_quantized", "quantization_method", "dtype"):
        assert getattr(model, attribute) == getattr(expected, attribute)

    model.save_pretrained(tmp_path / "coded")
    expected.save_pretrained(tmp_path / "plain")
    assert contents_of(tmp_path / "coded") == contents_of(tmp_path / "plain")
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(expected)))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32},
        {"dtype": "float16"},
        {"device_map": "auto"},
        {"quantization_config": CompressedTensorsConfig(dequantize=True)},
    ],
    ids=["float32", "float16", "device-map", "dequantize"],
)
def test_what_from_pretrained_is_given_does_the_same(
    options: dict[str, Any], checkpoints: dict[str, tuple[Path, Path]], kit: Any
) -> None:
    plain, coded = checkpoints["whole"]
    model, expected = load(coded, **options), load(plain, **options)
    kit.assert_same(model.state_dict(), expected.state_dict())
    assert model.is_quantized == expected.is_quantized
    assert torch.equal(kit.integers(kit.logits(model)), kit.integers(kit.logits(expected)))


def test_dtype_auto_without_a_dtype_in_the_config(
    make_llama: Callable[..., Path], kit: Any, tmp_path: Path
) -> None:
    dense = make_llama(tmp_path / "dense", num_hidden_layers=1, intermediate_size=96)
    config = json.loads((dense / "config.json").read_text())
    del config["dtype"]
    (dense / "config.json").write_text(json.dumps(config))
    plain = save_quantized(dense, tmp_path / "plain", [Scheme(4, 16, True)])
    pipeline.run("lossless.yaml", plain, tmp_path / "coded")
    assert load(tmp_path / "coded").dtype == torch.bfloat16
    kit.assert_same(load(tmp_path / "coded").state_dict(), load(plain).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_decompressing_gives_the_checkpoint_back(
    kind: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    plain, coded = checkpoints[kind]
    again = pipeline.decompress(coded, tmp_path / "again")
    assert contents_of(again) == contents_of(plain)
    assert contents_of(again)["config"]["quantization_config"]["quant_method"] == (
        "compressed-tensors"
    )
    for shard in plain.glob("*.safetensors"):
        assert (again / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_a_fresh_process_that_imports_transformers_only(
    checkpoints: dict[str, tuple[Path, Path]], kit: Any, tmp_path: Path
) -> None:
    plain, coded = checkpoints["mixed"]
    site = tmp_path / "site"
    (site / "entropress-0.0.dist-info").mkdir(parents=True)
    for name in ("compress", "_entropress_autoload.py"):
        (site / name).symlink_to(REPOSITORY / name)
    info = site / "entropress-0.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entropress\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nentropress = _entropress_autoload:autoload\n"
    )
    torch.save(kit.logits(load(plain)), tmp_path / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
expected = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    found = model(torch.arange(14).reshape(2, 7) * 5 % 90)
assert torch.equal(found[0].view(torch.int16), expected.view(torch.int16))
"""

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": str(site), **environment}
        command = [sys.executable, "-c", code, str(coded), str(tmp_path / "expected.pt")]
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )

    assert (done := run()).returncode == 0, done.stderr
    without = run(ENTROPRESS_AUTOLOAD="0")
    assert without.returncode != 0
    assert "ignore_mismatched_sizes" in without.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformers_that_does_not_know_the_format_raises(
    kind: str, checkpoints: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "entropress")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(checkpoints[kind][1])


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_flipped_bit_is_found_at_load_and_by_verify(part: str, mixed: tuple[Path, Path]) -> None:
    plain, coded = mixed
    assert verify(coded, plain).ok
    opened = room.open(coded)
    name = next(name for name in opened.tensor_infos() if name.endswith(part))
    file, start, nbytes = opened.stored(name)
    stored = bytearray((coded / file).read_bytes())
    stored[start + nbytes - 12] ^= 1
    (coded / file).write_bytes(stored)
    with pytest.raises(Corrupt, match=name):
        load(coded)
    assert any(name in fault for fault in verify(coded, plain).faults)


def test_verify_compares_the_quantization_too(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    plain, coded = mixed
    other = Path(shutil.copytree(plain, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (other / "config.json").write_text(json.dumps(config))
    assert verify(coded, other).faults == ["config.json: differs from the original's"]


@pytest.mark.parametrize("kind", KINDS)
def test_bits_per_weight_count_codes_scales_and_zero_points(
    kind: str, checkpoints: dict[str, tuple[Path, Path]], make_llama: Callable[..., Path]
) -> None:
    plain, coded = checkpoints[kind]
    dense = room.open(plain.parent / f"tied-{KINDS[kind].get('tied', False)}")
    weights = sum(info.nbytes for info in dense.tensor_infos().values()) // 2
    for directory in (plain, coded):
        opened, found = room.open(directory), inspect(directory)
        stored = sum(info.stored_nbytes for info in opened.tensor_infos().values())
        assert found.total.weights == sum(count_weights(opened).values()) == weights
        assert found.total.bits_per_weight == 8 * stored / weights
        [row] = [row for row in found.kinds if row.group == "self_attn.q_proj"]
        assert row.weights == 2 * 64 * 64
    report = room.open(coded).manifest["stages"][0]["metrics"]
    assert report["weights"] == weights
    assert report["bits_per_weight"] == round(inspect(coded).total.bits_per_weight, 3)


def test_the_plan_is_right(checkpoints: dict[str, tuple[Path, Path]]) -> None:
    plain, coded = checkpoints["mixed"]
    planned = pipeline.plan("lossless.yaml", plain)
    stored = sum(info.stored_nbytes for info in room.open(coded).tensor_infos().values())
    assert planned.bytes_out == pytest.approx(stored, rel=0.005)


def test_what_does_not_compress_is_stored_raw(
    checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    words = torch.randint(-(2**31), 2**31, (256, 512), dtype=torch.int64).to(torch.int32)
    tensors = {"a.weight_packed": words, "a.weight_shape": torch.tensor([256, 2048])}
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain/model.safetensors", {"format": "pt"})
    shutil.copy(checkpoints["packed"][0] / "config.json", tmp_path / "plain")
    pipeline.run("lossless.yaml", tmp_path / "plain", tmp_path / "out")
    info = room.open(tmp_path / "out").tensor_infos()["a.weight_packed"]
    assert info.nbytes < info.stored_nbytes < 1.001 * info.nbytes


def test_other_methods_are_refused_by_name(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    plain, coded = mixed
    other = Path(shutil.copytree(plain, tmp_path / "other"))
    for directory, member in ((other, None), (coded, "quantization_config")):
        config = json.loads((directory / "config.json").read_text())
        stated = config["quantization_config"]
        (stated[member] if member else stated)["quant_method"] = "gptq"
        (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="already quantized by gptq"):
        pipeline.plan("lossless.yaml", other)
    with pytest.raises(BadInput, match="gptq"):
        load(coded)
