from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from compress import checkpoint as room
from compress import pipeline, recipe
from compress.checkpoint import MANIFEST
from compress.errors import BadInput
from compress.evaluate import verify

QUICK = ["calibration.sequences=2", "calibration.length=64"]


@pytest.fixture(scope="module")
def coded(tiny_llama_sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "coded"
    pipeline.run("lossless.yaml", tiny_llama_sharded, out)
    return out


@pytest.fixture
def copy(coded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coded, tmp_path / "copy"))


def test_a_sound_checkpoint_has_no_faults(coded: Path, tiny_llama_sharded: Path) -> None:
    report = verify(coded, tiny_llama_sharded)
    assert report.ok
    assert report.kind == "lossless"
    assert report.tensors > 30
    assert report.against == "sharded"
    assert report.dropped == report.not_compared == []


@pytest.mark.parametrize("seed", range(6))
def test_every_flipped_bit_is_found_and_its_file_named(copy: Path, seed: int) -> None:
    chance = random.Random(seed)
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        broken = bytearray(whole)
        broken[place] ^= bit
        path.write_bytes(broken)
        report = verify(copy)
        assert not report.ok, f"bit {bit} of byte {place} of {path.name}"
        assert any(path.name in fault for fault in report.faults)
        path.write_bytes(whole)
    assert verify(copy).ok


def test_a_flipped_bit_in_a_tensor_names_the_tensor(copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    file, offset, nbytes = room.open(copy).stored(name)
    data = bytearray((copy / file).read_bytes())
    data[offset + nbytes // 2] ^= 4
    (copy / file).write_bytes(data)
    faults = verify(copy).faults
    assert any(file in fault and name in fault for fault in faults)
    assert any(fault.startswith(f"{file}: wrong sha256") for fault in faults)


def test_truncation_absence_and_surplus_are_found(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], b""):
        shard.write_bytes(broken)
        assert any(shard.name in fault for fault in verify(copy).faults)
    shard.write_bytes(whole)
    (copy / "extra.txt").write_text("x")
    assert verify(copy).faults == ["extra.txt: not in the manifest"]
    (copy / "extra.txt").unlink()
    (copy / "tokenizer.json").unlink()
    assert verify(copy).faults == ["tokenizer.json: missing"]
    (copy / MANIFEST).unlink()
    assert "unfinished" in verify(copy).faults[0]


def test_all_faults_are_collected(copy: Path) -> None:
    for path in copy.glob("*.json"):
        if path.name != MANIFEST:
            path.write_bytes(path.read_bytes() + b" ")
    faults = verify(copy).faults
    assert len(faults) >= 4
    assert len(faults) == len(set(faults))


def test_another_original_is_told_apart(
    coded: Path, tiny_llama_tied: Path, tiny_llama_sharded: Path, tmp_path: Path
) -> None:
    faults = verify(coded, tiny_llama_tied).faults
    assert any("differs from the original's" in fault for fault in faults)
    assert "lm_head.weight: the original has no lm_head.weight" in faults
    shutil.copytree(tiny_llama_sharded, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    (tmp_path / "other" / "tokenizer_config.json").write_text("{}")
    assert verify(coded, tmp_path / "other").faults == [
        "config.json: differs from the original's",
        "tokenizer_config.json: differs from the original's",
    ]


def test_one_changed_weight_is_told_apart(
    coded: Path, tiny_llama_sharded: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_sharded, tmp_path / "other")
    shard = sorted((tmp_path / "other").glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 128
    shard.write_bytes(data)
    [fault] = verify(coded, tmp_path / "other").faults
    assert "differs from the original's" in fault


def test_dropped_blocks_are_listed_and_the_rest_is_compared(
    tiny_llama: Path, tmp_path: Path
) -> None:
    overrides = ["stages.prune_blocks.drop=1", *QUICK]
    pipeline.run("entropy_prune.yaml", tiny_llama, tmp_path / "out", overrides=overrides)
    report = verify(tmp_path / "out", tiny_llama)
    assert report.faults == []
    assert len(report.dropped) == 9
    assert len({name.split(".")[2] for name in report.dropped}) == 1


def test_a_tensor_is_missing_only_if_a_stage_removed_it(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = ["stages.prune_blocks.drop=1", "stages.prune_blocks.heal=none", *QUICK]
    pipeline.run("entropy_prune.yaml", tiny_llama, tmp_path / "out", overrides=overrides)
    manifest = room.read_manifest(tmp_path / "out")
    removed = manifest["stages"][0]["removed"]
    kept, first = removed[1:], removed[0]
    for claimed, fault in (
        (kept, f"{first}: in the original but not here"),
        ([*removed, "lm_head.weight"], "lm_head.weight: the manifest says it was removed, .* here"),
        ([*removed, "no.such"], "no.such: the manifest says it was removed, .* never was"),
    ):
        manifest["stages"][0]["removed"] = claimed
        room.write_manifest(tmp_path / "out", manifest)
        [found] = verify(tmp_path / "out", tiny_llama).faults
        assert re.match(fault, found)
    manifest["stages"] = [None, {"removed": 3}, {"removed": removed}]
    room.write_manifest(tmp_path / "out", manifest)
    assert verify(tmp_path / "out", tiny_llama).ok


def test_what_a_second_removal_took_goes_by_its_first_name(
    tiny_llama: Path, tmp_path: Path
) -> None:
    first = {"drop": 1, "protect": [1, 2, 3, 4, 5]}
    twice = [{"prune_blocks": first}, {"prune_blocks": {"drop": 2}}]
    chosen = recipe.parse({"version": 1, "stages": twice}, QUICK)
    pipeline.run(chosen, tiny_llama, tmp_path / "out")
    report = verify(tmp_path / "out", tiny_llama)
    assert report.faults == []
    assert len(report.dropped) == 27


def test_a_quantized_original_is_told_apart(
    coded: Path, tiny_llama_sharded: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_sharded, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert verify(coded, tmp_path / "other").faults == ["config.json: differs from the original's"]


def test_a_coded_original_is_as_good_as_a_dense_one(coded: Path, copy: Path) -> None:
    assert verify(coded, copy).ok


def test_another_shape_is_a_fault_whatever_the_dtype(tmp_path: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    pipeline.run("lossless.yaml", tiny_llama, tmp_path / "out", overrides=["model.dtype=float16"])
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][None].clone()
    save_file(tensors, other / "model.safetensors")
    report = verify(tmp_path / "out", other)
    assert report.faults == ["model.norm.weight: differs from the original's model.norm.weight"]
    assert "model.norm.weight" not in report.not_compared


def test_what_was_cast_is_not_compared(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = ["model.dtype=float16"]
    pipeline.run("lossless.yaml", tiny_llama, tmp_path / "out", overrides=overrides)
    report = verify(tmp_path / "out", tiny_llama)
    assert report.ok
    assert len(report.not_compared) == report.tensors


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        verify(tmp_path / "nowhere")


def test_what_a_stage_changed_is_not_compared_but_named(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = ["stages.prune_blocks.drop=1", "stages.prune_blocks.heal=linear", *QUICK]
    pipeline.run("entropy_prune.yaml", tiny_llama, tmp_path / "out", overrides=overrides)
    report = verify(tmp_path / "out", tiny_llama)
    assert report.ok
    [healed] = report.not_compared
    assert healed.endswith("mlp.down_proj.weight")
    manifest = room.read_manifest(tmp_path / "out")
    assert manifest["stages"][0]["changed"] == [manifest["tensors"][healed].get("from", healed)]
    manifest["stages"][0]["changed"] = []
    room.write_manifest(tmp_path / "out", manifest)
    [fault] = verify(tmp_path / "out", tiny_llama).faults
    assert "differs from the original's" in fault
