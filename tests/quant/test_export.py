"""Quantized weights written as compressed-tensors load in plain transformers, to the bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress import checkpoint as room
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, CheckFailed, Corrupt
from compress.evaluate import verify
from compress.quant.ecsq import quantize_ecsq
from compress.quant.export import export_quantized
from compress.quant.export_proof import prove_export
from compress.quant.layers import linear_names
from compress.quant.qtensor import QTensor, Scheme
from compress.quant.rtn import quantize_rtn

Q = "model.layers.0.self_attn.q_proj"
EVERY = [Scheme(bits, group, True) for bits in range(2, 9) for group in (None, 16)]
ASYMMETRIC = [Scheme(bits, group, False) for bits in range(2, 9) for group in (None, 32)]


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("export") / "dense"
    options = {"num_hidden_layers": 2, "intermediate_size": 96, "tie_word_embeddings": False}
    return room.open(make_llama(directory, shard="40KB", **options))


class Export:
    """The linear weights of ``source`` but for the head, quantized by ``schemes`` in turn."""

    def __init__(self, source: Checkpoint, schemes: list[Scheme], **options: Any) -> None:
        linears = linear_names(source)
        names = [name for name in linears.weights if name != "lm_head.weight"]
        self.source, self.options = source, options
        self.schemes = {name: schemes[i % len(schemes)] for i, name in enumerate(names)}
        self.skipped = linears.skipped | {"lm_head.weight": "the head"}
        self.dtype = options.get("scale_dtype") or torch.bfloat16
        self.calls: list[str] = []

    def quantized(self, name: str) -> QTensor:
        self.calls.append(name)
        return quantize_rtn(self.source.read(name), self.schemes[name], self.dtype)

    def write(self, directory: Path) -> tuple[Checkpoint, dict[str, str]]:
        return export_quantized(
            self.source,
            self.schemes,
            self.quantized,
            directory,
            skipped=self.skipped,
            **self.options,
        )

    def prove(self, exported: Checkpoint, **options: Any) -> None:
        chosen = {"activations": self.options.get("activations")} | options
        prove_export(self.source, exported, self.schemes, self.quantized, **chosen)


@pytest.mark.parametrize(
    ("schemes", "options", "kind"),
    [
        (EVERY, {}, "pack-quantized"),
        (ASYMMETRIC, {}, "int-quantized"),
        ([Scheme(4, 16, True), Scheme(8, None, False)], {}, "mixed-precision"),
        (EVERY, {"activations": 8}, "int-quantized"),
        ([Scheme(8, None, True)], {"activations": 8}, "int-quantized"),
        ([Scheme(4, 32, True)], {"scale_dtype": torch.float16}, "pack-quantized"),
    ],
    ids=["every-width", "asymmetric", "mixed", "every-width-a8", "w8a8", "other-scales"],
)
def test_it_loads_as_the_model_that_the_codes_stand_for(
    schemes: list[Scheme], options: dict[str, Any], kind: str, source: Checkpoint, tmp_path: Path
) -> None:
    export = Export(source, schemes, **options)
    exported, _ = export.write(tmp_path / "out")
    assert exported.config["quantization_config"]["format"] == kind
    assert len(exported.config["quantization_config"]["config_groups"]) == len(schemes)
    export.prove(exported)


def test_ecsq_is_packed_eight_bits_by_row(source: Checkpoint, tmp_path: Path) -> None:
    export = Export(source, [Scheme(8, None, True)])
    export.quantized = lambda name: quantize_ecsq(source.read(name), 0.4, torch.bfloat16)  # type: ignore[method-assign]
    exported, _ = export.write(tmp_path / "out")
    export.prove(exported)
    infos = exported.tensor_infos()
    assert (infos[f"{Q}.weight_packed"].dtype, infos[f"{Q}.weight_packed"].shape) == (
        "I32",
        (64, 16),
    )
    assert exported.read(f"{Q}.weight_shape").tolist() == [64, 64]
    assert infos[f"{Q}.weight_scale"].shape == (64, 1)
    assert f"{Q}.weight" not in infos


def test_the_tensors_are_those_of_the_format(source: Checkpoint, tmp_path: Path) -> None:
    export = Export(source, [Scheme(5, 32, False)])
    exported, origins = export.write(tmp_path / "out")
    q = export.quantized(f"{Q}.weight")
    assert torch.equal(exported.read(f"{Q}.weight"), q.codes)
    assert torch.equal(exported.read(f"{Q}.weight_scale"), q.scale)
    assert torch.equal(exported.read(f"{Q}.weight_zero_point"), q.zero)
    infos = exported.tensor_infos()
    assert origins == {
        name: name.partition(".weight")[0] + ".weight" for name in infos if "_proj" in name
    }
    for name in infos.keys() - origins.keys():
        assert torch.equal(exported.read(name), source.read(name)), name
    shards = {name: info.file for name, info in source.tensor_infos().items()}
    assert {shards[origins.get(name, name)] == info.file for name, info in infos.items()} == {True}


def test_the_config_names_every_layer_once(source: Checkpoint, tmp_path: Path) -> None:
    export = Export(source, [Scheme(4, 16, True), Scheme(8, None, True)])
    stated = export.write(tmp_path / "out")[0].config
    quantization = stated.pop("quantization_config")
    assert stated == source.config
    groups = quantization["config_groups"].values()
    targets = [target for group in groups for target in group["targets"]]
    assert sorted(targets) == sorted(name.removesuffix(".weight") for name in export.schemes)
    assert quantization["ignore"] == ["lm_head"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["quantization_status"] == "compressed"


def test_a_weight_is_quantized_once_and_the_bytes_are_always_the_same(
    source: Checkpoint, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]
) -> None:
    export = Export(source, ASYMMETRIC)
    export.write(tmp_path / "one")
    order = [name for name in source.tensor_infos() if name in export.schemes]
    assert export.calls == order
    export.write(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_tied_head_stays_tied(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 96}
    tied = room.open(make_llama(tmp_path / "tied", tie_word_embeddings=True, **sizes))
    export = Export(tied, [Scheme(4, 16, True)])
    exported, _ = export.write(tmp_path / "out")
    assert exported.config["quantization_config"]["ignore"] == ["lm_head"]
    export.prove(exported)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_other_dtypes(
    dtype: torch.dtype, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    dense = make_llama(tmp_path / "bf16", num_hidden_layers=1, intermediate_size=96)
    AutoModelForCausalLM.from_pretrained(dense, dtype=dtype).save_pretrained(tmp_path / "dense")
    export = Export(room.open(tmp_path / "dense"), [Scheme(4, 32, False)], scale_dtype=dtype)
    exported, _ = export.write(tmp_path / "out")
    export.prove(exported)


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_zero_point"])
def test_the_proof_fails_where_one_bit_is_another(
    part: str, source: Checkpoint, tmp_path: Path
) -> None:
    export = Export(source, [Scheme(8, None, False)])
    exported, _ = export.write(tmp_path / "out")
    file, start, nbytes = exported.stored(f"{Q}.{part}")
    stored = bytearray((exported.path / file).read_bytes())
    stored[start + nbytes // 2] ^= 1
    (exported.path / file).write_bytes(stored)
    with pytest.raises(CheckFailed, match=f"{Q}.weight: loads as another weight"):
        export.prove(room.open(exported.path))


def test_the_proof_fails_where_activations_are_not_as_promised(
    source: Checkpoint, tmp_path: Path
) -> None:
    export = Export(source, [Scheme(8, None, True)], activations=8)
    exported, _ = export.write(tmp_path / "out")
    with pytest.raises(CheckFailed, match="logits with other bits"):
        export.prove(exported, activations=None)


def test_the_proof_fails_where_tokens_would_be_rounded_together(tmp_path: Path) -> None:
    """BERT's pooler sees the first token of every sequence of a batch, and no other axis."""
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=4, dtype=torch.bfloat16)
    BertModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    export = Export(room.open(tmp_path / "dense"), [Scheme(8, None, True)], activations=8)
    exported, _ = export.write(tmp_path / "out")
    with pytest.raises(CheckFailed, match=r"pooler\.dense\.weight: its inputs would not be"):
        export.prove(exported)
    del export.schemes["pooler.dense.weight"]
    export.prove(export.write(tmp_path / "without")[0])


def test_the_proof_fails_where_transformers_does(source: Checkpoint, tmp_path: Path) -> None:
    export = Export(source, [Scheme(4, 16, True)])
    exported, _ = export.write(tmp_path / "out")
    config = json.loads((exported.path / "config.json").read_text())
    whole = dict(config)
    whole["quantization_config"]["config_groups"]["group_0"]["format"] = "int-quantized"
    (exported.path / "config.json").write_text(json.dumps(whole))
    with pytest.raises((CheckFailed, Corrupt)):
        export.prove(room.open(exported.path))


def test_a_coded_checkpoint_gives_the_same_export(source: Checkpoint, tmp_path: Path) -> None:
    from compress import pipeline

    pipeline.run("lossless.yaml", source.path, tmp_path / "coded")
    plain = Export(source, [Scheme(4, 16, True)]).write(tmp_path / "one")[0]
    coded = Export(room.open(tmp_path / "coded"), [Scheme(4, 16, True)]).write(tmp_path / "two")[0]
    assert coded.config == plain.config
    for file in plain.files:
        one, two = load_file(plain.path / file), load_file(coded.path / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_verify_takes_the_parts_for_what_they_are_of(source: Checkpoint, tmp_path: Path) -> None:
    """With a manifest as a stage's report gives it: weights changed, their parts from them."""
    exported, origins = Export(source, [Scheme(4, 16, True), Scheme(4, 16, False)]).write(
        tmp_path / "out"
    )
    records = {}
    for name, info in exported.tensor_infos().items():
        digest = hashlib.sha256(b"".join(bytes(chunk) for chunk in exported.chunks(name)))
        record = {"dtype": info.dtype, "shape": list(info.shape), "sha256": digest.hexdigest()}
        origin = origins.get(name, name)
        records[name] = record | ({} if origin == name else {"from": origin})
    stage = {"stage": "quantize", "removed": [], "changed": sorted({*origins.values()})}
    empty = {"source": {}, "recipe": {}, "versions": {}, "gates": []}
    document = {**empty, "class": "near-lossless", "tensors": records, "stages": [stage]}
    room.write_manifest(exported.path, document | {"files": room.hash_files(exported.path)})

    report = verify(exported.path, source.path)
    assert report.faults == []
    assert report.not_compared == sorted(origins)

    other = Path(shutil.copytree(source.path, tmp_path / "other"))
    file, start, _ = source.stored("model.norm.weight")
    stored = bytearray((other / file).read_bytes())
    stored[start] ^= 1
    (other / file).write_bytes(stored)
    [fault] = verify(exported.path, other).faults
    assert "model.norm.weight: differs" in fault


def test_what_cannot_be_exported_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    out, name = tmp_path / "out", f"{Q}.weight"

    def write(schemes: dict[str, Scheme], checkpoint: Checkpoint = source, **options: Any) -> None:
        export_quantized(
            checkpoint,
            schemes,
            lambda name: quantize_rtn(source.read(name), Scheme(4, 16, True), torch.bfloat16),
            out,
            **options,
        )

    with pytest.raises(BadInput, match="no weight to quantize"):
        write({})
    with pytest.raises(BadInput, match="not the weight of a linear layer"):
        write({"model.norm.weight": Scheme(4, None, True)})
    with pytest.raises(BadInput, match="groups of 48 do not divide 64 columns"):
        write({name: Scheme(4, 48, True)})
    with pytest.raises(BadInput, match=r"q_proj.weight: was quantized in another way"):
        write({name: Scheme(4, 32, True)})
    with pytest.raises(BadInput, match="another way"):
        write({name: Scheme(4, 16, True)}, scale_dtype=torch.float16)
    quantized, _ = Export(source, [Scheme(4, 16, True)]).write(tmp_path / "quantized")
    with pytest.raises(BadInput, match="already quantized"):
        write({name: Scheme(4, 16, True)}, quantized)
