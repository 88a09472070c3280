from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from compress import checkpoint, stages
from compress.errors import BadInput, Corrupt
from compress.stages import Calibration, Workspace, encode_weights

STAGE = stages.get("encode_weights")


def encode(model: Path, directory: Path) -> tuple[checkpoint.Checkpoint, stages.StageReport]:
    return STAGE.run(checkpoint.open(model), STAGE.Config(), Workspace(directory))


def test_the_report_counts_what_was_written(tiny_llama_sharded: Path, tmp_path: Path) -> None:
    coded, report = encode(tiny_llama_sharded, tmp_path / "coded")
    dense = checkpoint.open(tiny_llama_sharded)
    metrics = report.metrics
    assert metrics["bytes_in"] == sum(info.nbytes for info in dense.tensor_infos().values())
    stored = sum(coded.stored(name)[2] for name in coded.tensor_infos())
    assert metrics["bytes_out"] == stored
    assert metrics["weights"] == metrics["bytes_in"] // 2
    assert metrics["bits_per_weight"] == round(8 * stored / metrics["weights"], 3)
    assert metrics["dtypes"]["BF16"]["tensors"] == metrics["tensors"] == len(dense.tensor_infos())


def test_the_records_are_of_the_original_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    _, report = encode(tiny_llama, tmp_path / "coded")
    dense = checkpoint.open(tiny_llama)
    for name, info in dense.tensor_infos().items():
        digest = hashlib.sha256(b"".join(dense.chunks(name))).hexdigest()
        expected = {"dtype": info.dtype, "shape": list(info.shape), "sha256": digest}
        assert report.tensors[name] == expected


def test_the_config_announces_the_format(tiny_llama: Path, tmp_path: Path) -> None:
    coded, _ = encode(tiny_llama, tmp_path / "coded")
    names = coded.tensor_infos()
    ours = coded.config.pop("quantization_config")
    assert ours == encode_weights.quantization_config(names.values())
    assert ours["dtype"] == "bfloat16"
    assert ours["names_sha256"] == checkpoint.names_sha256(names)
    assert coded.config == checkpoint.open(tiny_llama).config
    assert coded.metadata(coded.files[0]) == {"format": "pt", "entropress": "1"}


def test_a_plan_that_need_not_be_exact_reads_no_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    dense = checkpoint.open(shutil.copytree(tiny_llama, tmp_path / "dense"))
    shutil.rmtree(dense.path)
    estimate = STAGE.plan(dense, STAGE.Config(), Calibration(), exact=False)
    assert estimate.nbytes == sum(info.nbytes for info in dense.tensor_infos().values())


def test_the_plan_is_exact(tiny_llama: Path, tmp_path: Path) -> None:
    estimate = STAGE.plan(checkpoint.open(tiny_llama), STAGE.Config(), Calibration())
    _, report = encode(tiny_llama, tmp_path / "coded")
    assert estimate.nbytes == pytest.approx(report.metrics["bytes_out"], rel=0.005)


def test_what_is_coded_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    coded, _ = encode(tiny_llama, tmp_path / "coded")
    with pytest.raises(BadInput, match="already compressed"):
        STAGE.plan(coded, STAGE.Config(), Calibration())
    with pytest.raises(BadInput, match="already compressed"):
        encode(coded.path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_decoding_checks_the_manifest(tiny_llama: Path, tmp_path: Path) -> None:
    coded, report = encode(tiny_llama, tmp_path / "coded")
    name = next(iter(report.tensors))
    report.tensors[name]["sha256"] = "0" * 64
    empty = {"source": {}, "recipe": {}, "versions": {}, "stages": [], "files": {}, "gates": []}
    document = {**empty, "class": "lossless", "tensors": report.tensors}
    checkpoint.write_manifest(coded.path, document)
    with pytest.raises(Corrupt, match=rf"{name}: has another sha256"):
        encode_weights.decode(checkpoint.open(coded.path), tmp_path / "dense")
    assert not (tmp_path / "dense" / "model.safetensors").exists()


def test_the_announced_dtype_is_the_one_transformers_would_find(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    # The writer of safetensors puts wider dtypes first; transformers goes by name.
    tensors = {"b": torch.zeros(3), "a": torch.zeros(3).half(), "A": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    infos = checkpoint.open(tmp_path).tensor_infos().values()
    assert encode_weights.quantization_config(infos)["dtype"] == "float16"
