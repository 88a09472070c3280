"""Weights written as bitsandbytes stores them load in plain transformers, to the bit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress import checkpoint as room
from compress.checkpoint import Checkpoint
from compress.errors import BadInput, CheckFailed, EntropressError, Missing
from compress.quant.bnb import export_bnb
from compress.quant.bnb_parts import bnb_rate, bnb_unfit
from compress.quant.bnb_proof import prove_bnb
from compress.quant.layers import linear_names

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

LAYER = "model.layers.0.self_attn.q_proj"
KINDS: list[tuple[Any, dict[str, Any]]] = [
    ("nf4", {}),
    ("nf4", {"double_quant": True}),
    ("int8", {}),
]
IDS = ["nf4", "nf4-double", "int8"]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def source(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("bnb") / "dense"
    options = {"num_hidden_layers": 1, "intermediate_size": 128, "tie_word_embeddings": False}
    return room.open(make_llama(directory, shard="40KB", **options))


@pytest.fixture(scope="module")
def names(source: Checkpoint) -> list[str]:
    return [name for name in linear_names(source).weights if name != "lm_head.weight"]


def transformers_save(source: Checkpoint, directory: Path, **options: Any) -> Path:
    """What transformers saves of the model it quantizes as it loads."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.path,
        dtype="auto",
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **options),
    )
    model.save_pretrained(directory)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def saved(directory: Path, config: Any, auto: Any) -> Checkpoint:
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return room.open(directory)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_it_is_what_transformers_saves(
    kind: Any, options: dict[str, Any], source: Checkpoint, names: list[str], tmp_path: Path
) -> None:
    exported, origins = export_bnb(source, names, kind, tmp_path / "out", **options)
    asked = {"load_in_8bit": True}
    if kind == "nf4":
        asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        asked["bnb_4bit_compute_dtype"] = torch.bfloat16
        asked["bnb_4bit_use_double_quant"] = options.get("double_quant", False)
    theirs = transformers_save(source, tmp_path / "theirs", **asked)

    stated = json.loads((theirs / "config.json").read_text())["quantization_config"]
    assert json.loads((exported.path / "config.json").read_text()) == {
        **source.config,
        "quantization_config": stated,
    }
    found, expected = tensors(exported.path), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(words(found[name]), words(tensor)), name

    assert origins.keys() == found.keys() - (source.tensor_infos().keys() - {*names})
    assert all(part.startswith(origin.removesuffix("weight")) for part, origin in origins.items())
    homes = {name: info.file for name, info in source.tensor_infos().items()}
    for name, info in exported.tensor_infos().items():
        assert info.file == homes[origins.get(name, name)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_it_loads_as_the_source_quantized_at_load(
    kind: Any,
    options: dict[str, Any],
    dtype: torch.dtype,
    source: Checkpoint,
    names: list[str],
    tmp_path: Path,
) -> None:
    source.load_model(dtype).save_pretrained(tmp_path / "dense")
    dense = room.open(tmp_path / "dense")
    exported, _ = export_bnb(dense, names, kind, tmp_path / "out", **options)
    assert exported.load_model().dtype == dtype
    prove_bnb(dense, exported, names, kind)


def test_where_the_config_is_silent_the_dtype_is_the_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The head's scales, which are float32 and come first, would be taken for the model's dtype."""
    dense = Path(shutil.copytree(tiny_llama, tmp_path / "dense"))
    config = json.loads((dense / "config.json").read_text())
    del config["dtype"]
    (dense / "config.json").write_text(json.dumps(config))
    chosen = linear_names(room.open(dense)).weights
    exported, _ = export_bnb(room.open(dense), chosen, "int8", tmp_path / "out")
    prove_bnb(room.open(dense), exported, chosen, "int8")
    assert exported.load_model().config.dtype == torch.bfloat16

    (dense / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    with pytest.raises(BadInput, match=r"got torch\.bfloat16, expected torch\.float32; set model"):
        export_bnb(room.open(dense), chosen, "int8", tmp_path / "other")


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_only_the_named_layers_are_quantized(
    kind: Any, options: dict[str, Any], source: Checkpoint, tmp_path: Path
) -> None:
    """The head too, which transformers would leave out by itself, but not a layer between."""
    chosen = [name for name in linear_names(source).weights if "up_proj" not in name]
    exported, _ = export_bnb(source, chosen, kind, tmp_path / "out", **options)
    stated = exported.config["quantization_config"]["llm_int8_skip_modules"]
    assert stated == ["model.layers.0.mlp.up_proj"]
    prove_bnb(source, exported, chosen, kind)
    every = [*chosen, "model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckFailed, match=f"up_proj: is not {kind} once loaded"):
        prove_bnb(source, exported, every, kind)
    with pytest.raises(CheckFailed, match="lm_head: is quantized once loaded"):
        prove_bnb(source, exported, [n for n in chosen if n != "lm_head.weight"], kind)
    whole, _ = export_bnb(source, every, kind, tmp_path / "whole", **options)
    prove_bnb(source, whole, every, kind)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_tied_head_and_the_embeddings_stay(
    kind: Any, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"num_hidden_layers": 1, "intermediate_size": 128}
    tied = room.open(make_llama(tmp_path / "tied", tie_word_embeddings=True, **options))
    chosen = linear_names(tied).weights
    exported, _ = export_bnb(tied, chosen, kind, tmp_path / "out")
    assert exported.config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    prove_bnb(tied, exported, chosen, kind)
    model = exported.load_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(BadInput, match=r"lm_head\.weight: .* got tied to the embeddings"):
        export_bnb(tied, [*chosen, "lm_head.weight"], kind, tmp_path / "other")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_other_architectures(kind: Any, tmp_path: Path) -> None:
    """Layers with biases; experts that are merged as they are loaded, which stay."""
    import transformers

    bert = saved(tmp_path / "bert", transformers.BertConfig(**SIZES), transformers.AutoModel)
    experts = transformers.Qwen2MoeConfig(
        **SIZES,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )
    moe = saved(tmp_path / "moe", experts, transformers.AutoModelForCausalLM)
    for dense in (bert, moe):
        chosen = linear_names(dense).weights
        exported, _ = export_bnb(dense, chosen, kind, dense.path.with_suffix(".out"))
        prove_bnb(dense, exported, chosen, kind)


def test_what_transformers_would_skip_by_another_name_is_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=96, decoder_start_token_id=0, **sizes)
    t5 = saved(tmp_path / "t5", config, transformers.AutoModelForSeq2SeqLM)
    chosen = linear_names(t5).weights
    with pytest.raises(BadInput, match=r"wo\.weight: transformers would skip it with 'wo'"):
        export_bnb(t5, chosen, "nf4", tmp_path / "out")
    kept = [name for name in chosen if not name.endswith("wo.weight")]
    exported, _ = export_bnb(t5, kept, "nf4", tmp_path / "out")
    prove_bnb(t5, exported, kept, "nf4")

    bert = saved(tmp_path / "bert", transformers.BertConfig(**SIZES), transformers.AutoModel)
    chosen = linear_names(bert).weights
    named = {"encoder.layer.0.output.dense.weight": "", "layer.0.intermediate.dense.weight": ""}
    with pytest.raises(BadInput, match=r"0\.intermediate\.dense\.weight: transformers would skip"):
        export_bnb(bert, chosen[4:5], "nf4", tmp_path / "bert.out", skipped=named)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=IDS)
def test_the_rate_is_what_is_stored(
    kind: Any, options: dict[str, Any], source: Checkpoint, names: list[str], tmp_path: Path
) -> None:
    exported, origins = export_bnb(source, names, kind, tmp_path / "out", **options)
    infos = exported.tensor_infos()
    rate = bnb_rate(names, source.tensor_infos(), kind, **options)
    assert rate.weights == sum(source.read(name).numel() for name in names)
    assert rate.codes == 8 * sum(infos[name].nbytes for name in names)
    stored = [part for part in origins if "quant_state" not in part]
    assert rate.bits == 8 * sum(infos[part].nbytes for part in stored)
    assert rate.zeros == 0


def test_the_bytes_are_always_the_same_and_a_coded_source_gives_them(
    source: Checkpoint,
    names: list[str],
    tmp_path: Path,
    contents: Callable[[Path], dict[str, bytes]],
) -> None:
    from compress import pipeline

    pipeline.run("lossless.yaml", source.path, tmp_path / "coded")
    coded = room.open(tmp_path / "coded")
    options = {"double_quant": True}
    plain, _ = export_bnb(source, names, "nf4", tmp_path / "one", **options)
    export_bnb(source, reversed(names), "nf4", tmp_path / "two", **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    exported, _ = export_bnb(coded, names, "nf4", tmp_path / "three", **options)
    assert exported.config == plain.config
    one, other = tensors(plain.path), tensors(exported.path)
    assert one.keys() == other.keys()
    assert all(torch.equal(words(one[name]), words(other[name])) for name in one)
    prove_bnb(coded, exported, names, "nf4")


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("nf4", "self_attn.q_proj.weight", "q_proj.weight: loads as another weight"),
        ("nf4", "self_attn.q_proj.weight.absmax", "q_proj.weight.absmax: loads as another tensor"),
        ("nf4", "self_attn.q_proj.weight.nested_absmax", "q_proj.weight: loads as another weight"),
        ("int8", "self_attn.q_proj.weight", "q_proj.weight: loads as another weight"),
        ("int8", "self_attn.q_proj.SCB", "q_proj.weight: loads as another weight"),
        ("int8", "input_layernorm.weight", "loads as another tensor"),
    ],
)
def test_the_proof_fails_where_one_bit_is_another(
    kind: Any, part: str, message: str, source: Checkpoint, names: list[str], tmp_path: Path
) -> None:
    options = {"double_quant": True} if "nested" in part else {}
    exported, _ = export_bnb(source, names, kind, tmp_path / "out", **options)
    file, start, nbytes = exported.stored(f"model.layers.0.{part}")
    stored = bytearray((exported.path / file).read_bytes())
    stored[start + nbytes // 2] ^= 1
    (exported.path / file).write_bytes(stored)
    with pytest.raises(CheckFailed, match=message):
        prove_bnb(source, room.open(exported.path), names, kind)


def test_the_proof_fails_where_the_kind_is_another(
    source: Checkpoint, names: list[str], tmp_path: Path
) -> None:
    exported, _ = export_bnb(source, names, "int8", tmp_path / "out")
    with pytest.raises(CheckFailed, match="is not nf4 once loaded"):
        prove_bnb(source, exported, names, "nf4")


def test_the_proof_fails_where_transformers_does(
    source: Checkpoint, names: list[str], tmp_path: Path
) -> None:
    exported, _ = export_bnb(source, names, "nf4", tmp_path / "out")
    path = exported.path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bnb_4bit_quant_storage"] = "float64"
    path.write_text(json.dumps(config))
    with pytest.raises(EntropressError):
        prove_bnb(source, room.open(exported.path), names, "nf4")


def test_what_cannot_be_quantized_is_refused(
    source: Checkpoint, names: list[str], make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    out, name = tmp_path / "out", f"{LAYER}.weight"
    with pytest.raises(BadInput, match="no weight to quantize"):
        export_bnb(source, [], "nf4", out)
    for wrong in ("model.norm.weight", "nowhere.weight"):
        with pytest.raises(BadInput, match=f"{wrong}: is not the weight of a linear layer"):
            export_bnb(source, [wrong], "nf4", out)
    with pytest.raises(BadInput, match="quantized and skipped, got kept"):
        export_bnb(source, [name], "nf4", out, skipped={name: "kept"})
    with pytest.raises(BadInput, match="int8 knows neither"):
        export_bnb(source, [name], "int8", out, double_quant=True)
    with pytest.raises(BadInput, match="int8 knows neither"):
        export_bnb(source, [name], "int8", out, compute_dtype=torch.float16)
    odd = room.open(make_llama(tmp_path / "odd", num_hidden_layers=1, intermediate_size=80))
    with pytest.raises(BadInput, match=r"down_proj\.weight: is 64 x 80, not multiples of 32 and"):
        export_bnb(odd, ["model.layers.0.mlp.down_proj.weight"], "nf4", out)
    chosen = linear_names(odd).weights
    exported, _ = export_bnb(odd, chosen, "int8", out)
    prove_bnb(odd, exported, chosen, "int8")
    with pytest.raises(BadInput, match="already quantized"):
        export_bnb(exported, [name], "nf4", tmp_path / "again")


@pytest.mark.parametrize(("kind", "value"), [("nf4", "inf"), ("int8", "nan"), ("int8", "7e4")])
def test_values_that_have_no_code_are_refused(
    kind: Any, value: str, source: Checkpoint, names: list[str], tmp_path: Path
) -> None:
    model = source.load_model()
    model.get_parameter(f"{LAYER}.weight").data[3, 5] = float(value)
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(BadInput, match=r"q_proj\.weight: holds values that are not finite in"):
        export_bnb(room.open(tmp_path / "dense"), names, kind, tmp_path / "out")


def test_without_bitsandbytes(
    source: Checkpoint, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Missing, match=r"pip install bitsandbytes accelerate"):
        export_bnb(source, names, "nf4", tmp_path / "out")
    assert bnb_unfit(source.tensor_infos()[names[0]], "nf4") is None
