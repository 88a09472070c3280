from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from compress import checkpoint, pipeline, stages
from compress.errors import BadInput, Missing
from compress.workspace import open_workspace, workspace_path

LOSSLESS = "lossless.yaml"
PRUNE_ONLY = {"version": 1, "stages": [{"prune_blocks": {"drop": 1}}]}
QUICK = ["calibration.sequences=2", "calibration.length=64"]


def recipe_of(data: dict[str, Any]) -> Any:
    from compress import recipe

    return recipe.parse(data, QUICK, name="test")


def test_lossless_output_holds_every_tensor(tiny_llama_sharded: Path, tmp_path: Path) -> None:
    result = pipeline.run(LOSSLESS, tiny_llama_sharded, tmp_path / "out")
    before, after = checkpoint.open(tiny_llama_sharded), checkpoint.open(tmp_path / "out")
    assert after.coded
    assert after.files == before.files
    assert list(after.tensor_infos()) == list(before.tensor_infos())
    for name in before.tensor_infos():
        assert b"".join(after.chunks(name)) == b"".join(before.chunks(name))
    assert result.manifest["class"] == "lossless"
    assert result.bytes_out < result.bytes_in
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_manifest_tells_the_whole_story(tiny_llama: Path, tmp_path: Path) -> None:
    overrides = ["stages.prune_blocks.drop=1", "stages.prune_blocks.heal=linear", *QUICK]
    pipeline.run("entropy_prune.yaml", tiny_llama, tmp_path / "out", overrides=overrides)
    manifest = checkpoint.read_manifest(tmp_path / "out")
    assert manifest["class"] == "near-lossless"
    assert manifest["source"] == {"id": "tiny", "revision": None}
    assert manifest["recipe"]["stages"][0]["prune_blocks"]["drop"] == 1
    assert [report["stage"] for report in manifest["stages"]] == ["prune_blocks", "encode_weights"]
    assert str(tmp_path) not in json.dumps(manifest)
    assert str(tiny_llama) not in json.dumps(manifest)
    before, after = checkpoint.open(tiny_llama), checkpoint.open(tmp_path / "out")
    [healed] = manifest["stages"][0]["changed"]
    for name, record in manifest["tensors"].items():
        origin = record.get("from", name)
        same = b"".join(after.chunks(name)) == b"".join(before.chunks(origin))
        assert same == (origin != healed)
    assert any("from" in record for record in manifest["tensors"].values())


def test_a_recipe_without_coding_still_gives_a_sealed_checkpoint(
    tiny_llama: Path, tmp_path: Path
) -> None:
    pipeline.run(recipe_of(PRUNE_ONLY), tiny_llama, tmp_path / "out")
    outcome = checkpoint.open(tmp_path / "out")
    assert not outcome.coded
    assert outcome.manifest is not None
    assert outcome.manifest["tensors"].keys() == outcome.tensor_infos().keys()


def test_equal_inputs_give_equal_bytes(
    tiny_llama: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    pipeline.run(LOSSLESS, tiny_llama, tmp_path / "a", threads=1)
    pipeline.run(LOSSLESS, tiny_llama, tmp_path / "elsewhere" / "b", threads=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "elsewhere" / "b")


def test_a_dtype_is_a_cast_before_the_first_stage(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    overrides = ["model.dtype=float32"]
    result = pipeline.run(LOSSLESS, tiny_llama, tmp_path / "out", overrides=overrides)
    assert result.manifest["class"] == "near-lossless"
    outcome = checkpoint.open(tmp_path / "out")
    assert outcome.config["dtype"] == "float32"
    original = checkpoint.open(tiny_llama)
    for name in original.tensor_infos():
        assert torch.equal(outcome.read(name), original.read(name).float())


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_llama_sharded"])
def test_the_plan_predicts_the_size(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    planned = pipeline.plan(LOSSLESS, model)
    assert list(tmp_path.iterdir()) == []
    result = pipeline.run(LOSSLESS, model, tmp_path / "out")
    assert planned.bytes_in == result.bytes_in
    assert abs(planned.bytes_out - result.bytes_out) <= 0.005 * result.bytes_out


def test_the_plan_of_later_stages_follows_the_earlier_ones(tiny_llama: Path) -> None:
    whole = pipeline.plan(LOSSLESS, tiny_llama)
    pruned = pipeline.plan("entropy_prune.yaml", tiny_llama, overrides=QUICK)
    first, last = pruned.stages
    assert first.nbytes < pruned.bytes_in
    assert last.nbytes == pytest.approx(first.nbytes * whole.bytes_out / whole.bytes_in, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_follows_a_cast_is_planned_on_the_cast_tensors(
    dtype: str, tiny_llama: Path, tmp_path: Path
) -> None:
    overrides = [f"model.dtype={dtype}"]
    planned = pipeline.plan(LOSSLESS, tiny_llama, overrides=overrides)
    result = pipeline.run(LOSSLESS, tiny_llama, tmp_path / "out", overrides=overrides)
    assert [stage.stage for stage in planned.stages] == ["cast", "encode_weights"]
    assert planned.bytes_out == pytest.approx(result.bytes_out, rel=0.005)


def test_a_text_in_the_home_directory_is_told_by_its_content(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text, overrides = tmp_path / "mine.txt", [*QUICK, "calibration.data=~/mine.txt"]
    run = partial(pipeline.run, "entropy_prune.yaml", tiny_llama, overrides=overrides)

    def stop(*args: Any) -> None:
        raise InterruptedError

    text.write_text("To be, or not to be. " * 40)
    with monkeypatch.context() as patch:
        patch.setattr(type(stages.get("encode_weights")), "run", stop)
        with pytest.raises(InterruptedError):
            run(tmp_path / "out")
    text.write_text("That is the question! " * 40)
    resumed, whole = run(tmp_path / "out", resume=True), run(tmp_path / "whole")
    assert resumed.manifest == whole.manifest
    assert whole.manifest["recipe"]["calibration"]["data"] == "mine.txt"


@pytest.mark.parametrize("data", ["~/lost/mine.txt", "/lost/mine.txt", "lost/mine.txt"])
def test_a_text_that_is_not_read_leaves_no_path_either(
    data: str, tiny_llama: Path, tmp_path: Path
) -> None:
    overrides = [f"calibration.data={data}"]
    result = pipeline.run(LOSSLESS, tiny_llama, tmp_path / "out", overrides=overrides)
    assert result.manifest["recipe"]["calibration"]["data"] == "mine.txt"


def test_a_null_quantization_config_is_none(tiny_llama: Path, tmp_path: Path) -> None:
    from compress.evaluate import verify

    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    pipeline.run(LOSSLESS, model, tmp_path / "out")
    assert verify(tmp_path / "out", model).faults == []
    assert verify(tmp_path / "out", tiny_llama).faults == []


def test_an_existing_output_is_kept_unless_told_otherwise(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.run(LOSSLESS, tiny_llama, out)
    (out / "mine.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(BadInput, match="the output exists.*--overwrite"):
            pipeline.run(LOSSLESS, tiny_llama, out, resume=resume)
    assert (out / "mine.txt").read_text() == "mine"
    pipeline.run(LOSSLESS, tiny_llama, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_output_directory_may_exist(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pipeline.run(LOSSLESS, tiny_llama, tmp_path / "out")
    assert checkpoint.open(tmp_path / "out").manifest is not None


def test_what_is_no_checkpoint_is_never_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(BadInput, match="is not a checkpoint"):
        pipeline.run(LOSSLESS, tiny_llama, tmp_path / "letters", overwrite=True)
    with pytest.raises(BadInput, match="the output exists"):
        pipeline.run(LOSSLESS, tiny_llama, tmp_path / "letters" / "dear.txt")


@pytest.mark.parametrize("where", [".", "..", "inside"])
def test_the_input_is_never_the_output(tiny_llama: Path, tmp_path: Path, where: str) -> None:
    model = tmp_path / "home" / "model"
    shutil.copytree(tiny_llama, model)
    with pytest.raises(BadInput, match="output and input overlap|is not a checkpoint"):
        pipeline.run(LOSSLESS, model, model / where, overwrite=True)
    assert (model / "model.safetensors").is_file()


def test_the_input_is_never_the_output_behind_a_link(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(BadInput, match="overlap|not a checkpoint|exists"):
        pipeline.run(LOSSLESS, tmp_path / "link", tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_coded_or_quantized_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    pipeline.run(LOSSLESS, tiny_llama, tmp_path / "out")
    with pytest.raises(BadInput, match="already compressed by entropress; decompress it first"):
        pipeline.run(LOSSLESS, tmp_path / "out", tmp_path / "again")
    shutil.copytree(tiny_llama, tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="already quantized by gptq"):
        pipeline.run(LOSSLESS, tmp_path / "quantized", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "quantized"]


def test_two_runs_at_once_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    busy = pytest.raises(BadInput, match="another run is writing here")
    with open_workspace(tmp_path / "out", overwrite=False), busy:
        pipeline.run(LOSSLESS, tiny_llama, tmp_path / "out", resume=True)


def test_too_little_room_is_found_before_writing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(Missing, match="not enough room on disk"):
        pipeline.run(LOSSLESS, tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Missing, match="cannot be written"):
        pipeline.run(LOSSLESS, tiny_llama, tmp_path / "file" / "out")


def test_decompressing_gives_the_original_back(tiny_llama_sharded: Path, tmp_path: Path) -> None:
    pipeline.run(LOSSLESS, tiny_llama_sharded, tmp_path / "out")
    pipeline.decompress(tmp_path / "out", tmp_path / "dense")
    before, after = checkpoint.open(tiny_llama_sharded), checkpoint.open(tmp_path / "dense")
    assert after.config == before.config
    assert after.sidecars() == before.sidecars()
    for name, info in before.tensor_infos().items():
        assert after.tensor_infos()[name] == info
        assert b"".join(after.chunks(name)) == b"".join(before.chunks(name))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "dense"}
    with pytest.raises(BadInput, match="the output exists"):
        pipeline.decompress(tmp_path / "out", tmp_path / "dense")
    with pytest.raises(BadInput, match="is not compressed by entropress"):
        pipeline.decompress(tmp_path / "dense", tmp_path / "again")
    assert not workspace_path(tmp_path / "again").exists()
