"""Visual tokens: from a file of images and prompts to a checkpoint that transformers follows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import compress
from compress import checkpoint as room
from compress import pipeline, tokens
from compress import recipe as recipes
from compress.errors import BadInput
from compress.stages.visual_inputs import Pictured, read_examples, visual_inputs

pytest.importorskip("PIL")

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "window_size": 16,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
SPECIAL = {
    "llava": ("<image>",),
    "idefics3": ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
}
needs_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="processors of videos need torchvision"
)
FAMILIES = ("llava", "idefics3", pytest.param("qwen2_5_vl", marks=needs_torchvision))


def make_processor(family: str, tokenizer: Any) -> Any:
    """As the family has it, for images of 16 px, or of multiples of 8 px for Qwen2.5-VL."""
    if family == "llava":
        from transformers import CLIPImageProcessorPil, LlavaProcessor

        square = {"height": 16, "width": 16}
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if family == "idefics3":
        from transformers import Idefics3ImageProcessorPil, Idefics3Processor

        edge = {"longest_edge": 16}
        images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        return Idefics3Processor(images, tokenizer, image_seq_len=16)
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    limits = {"shortest_edge": 256, "longest_edge": 4096}
    images = Qwen2VLImageProcessor(patch_size=4, size=limits)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(patch_size=4))


def make_config(family: str, ids: list[int]) -> Any:
    from transformers import AutoConfig

    if family == "llava":
        clip = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
        text = {"model_type": "llama", **TEXT}
        more = {"vision_config": clip, "vision_feature_layer": -1, "image_token_index": ids[0]}
    elif family == "idefics3":
        text = {"model_type": "llama", **TEXT}
        vision = {**VISION, "patch_size": 2}
        more = {"vision_config": vision, "image_token_id": ids[0]}
    else:
        text = {"model_type": "qwen2_5_vl_text", "rope_parameters": MROPE, **TEXT}
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        more = {"vision_config": QWEN_VISION, **dict(zip(names, ids, strict=True))}
    return AutoConfig.for_model(family, text_config=text, **more)


@pytest.fixture(scope="module")
def make_vlm(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family with its processor, in float32. Read-only."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
            tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[family])})
            ids = tokenizer.convert_tokens_to_ids(list(SPECIAL[family]))
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(make_config(family, ids))
            for parameter in model.parameters():
                if parameter.ndim > 1:  # as initialised, layers change next to nothing
                    torch.nn.init.normal_(parameter, std=0.15)
            made[family] = tmp_path_factory.mktemp("vlm") / family
            model.save_pretrained(made[family])
            make_processor(family, tokenizer).save_pretrained(made[family])
        return made[family]

    return make


def picture(number: int) -> Any:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images, and the file that names them."""
    directory = tmp_path_factory.mktemp("images")
    lines = []
    for number in range(20):
        picture(number).save(directory / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "text": f"What is number {number}?"}))
    (directory / "images.jsonl").write_text("\n".join(lines) + "\n")
    return directory / "images.jsonl"


def recipe(images: Path, *after: Any, before: Sequence[Any] = (), gates: Sequence[Any] = ()) -> Any:
    stage = {"keep": 0.25, "selector": "logdet", "insist": True, "draws": 1, "inputs": str(images)}
    return recipes.parse(
        {
            "version": 1,
            "calibration": {"sequences": 20, "length": 64},
            "stages": [*before, {"prune_tokens": stage}, *after],
            "gates": list(gates),
        }
    )


def prompts(model: Path, *rows: int) -> Any:
    """A batch of prompts of different lengths with an image each."""
    processor = AutoProcessor.from_pretrained(model)
    processor.tokenizer.padding_side = "left"
    texts = [f"{processor.image_token}\n{'What? ' * (row + 1)}" for row in rows]
    pictures = [[picture(100 + row)] for row in rows]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def answers(model: Any, given: Any) -> torch.Tensor:
    return model.generate(
        **given, max_new_tokens=6, do_sample=False, pad_token_id=0, suppress_tokens=[259, 260]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_coded_model_that_sees_follows_its_policy_by_itself(
    family: str, make_vlm: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    source, out = make_vlm(family), tmp_path / "out"
    manifest = pipeline.run(recipe(images, "encode_weights"), source, out).manifest
    metrics = manifest["stages"][0]["metrics"]
    assert set(metrics["losses"]) == {"random", "logdet"}
    assert metrics["inputs"] == 20
    assert metrics["tokens"] >= 15
    assert str(images.parent) not in json.dumps(manifest)
    assert compress.verify(out, source).ok
    model = AutoModelForImageTextToText.from_pretrained(out)
    original = AutoModelForImageTextToText.from_pretrained(source)
    given = prompts(out, 0, 1)
    pruned, whole = model(**given).logits, original(**given).logits
    found = tokens.last_report(model)
    assert found is not None
    kept = [math.ceil(segment.tokens / 4) for segment in found.segments]
    assert [segment.kept for segment in found.segments] == kept
    assert len(kept) == 2
    assert pruned.shape == whole.shape
    assert not torch.equal(pruned, whole)
    with tokens.switched_off(model):
        assert torch.equal(model(**given).logits, whole)
        assert torch.equal(answers(model, given), answers(original, given))
    both = answers(model, given)
    for row in range(2):
        assert torch.equal(answers(model, prompts(out, row))[0, -6:], both[row, -6:])
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in room.open(tmp_path / "again").config
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert tokens.attached(again) is None  # it is dense
    tokens.attach_stored(again)
    assert torch.equal(again(**given).logits, pruned)


def test_blocks_go_first_and_then_tokens(
    make_vlm: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    source, out = make_vlm("llava"), tmp_path / "out"
    blocks = {"prune_blocks": {"drop": 1}}
    pipeline.run(recipe(images, "encode_weights", before=[blocks]), source, out)
    assert compress.verify(out, source).ok
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.config.text_config.num_hidden_layers == 4
    given = prompts(out, 0, 1)
    assert model(**given).logits.isfinite().all()
    found = tokens.last_report(model)
    assert found is not None
    assert [segment.kept for segment in found.segments] == [4, 4]


@pytest.mark.slow
def test_a_gate_shows_both_models_the_same_images(
    make_vlm: Callable[[str], Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTROPRESS_CACHE", str(tmp_path / "cache"))
    gate = {"lm_eval": {"tasks": ["entropress_colours"], "limit": 12, "max_drop": 1}}
    found = pipeline.run(
        recipe(images, "encode_weights", gates=[gate]), make_vlm("llava"), tmp_path / "out"
    )
    assert found.passed
    (row,) = found.gates[0].rows
    assert (row.name, row.documents) == ("entropress_colours exact_match", 12)


def test_prompts_may_say_where_the_image_is(make_vlm: Callable[[str], Path], images: Path) -> None:
    checkpoint, image = room.open(make_vlm("llava")), images.parent / "0.png"
    texts = ("What?", "<image>\nWhat?", "What <image>?")
    plain, same, inside = (
        visual_inputs(checkpoint, [Pictured(image, text)])[0]["input_ids"] for text in texts
    )
    assert torch.equal(plain, same)
    assert not torch.equal(plain, inside)
    token = checkpoint.config["image_token_index"]
    assert [int((ids == token).sum()) for ids in (plain, inside)] == [16, 16]


def test_what_is_no_image_or_no_example_is_named(
    make_vlm: Callable[[str], Path], tiny_llama: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    (tmp_path / "x.png").write_bytes(b"no image")
    lines.write_text('\n{"image": "x.png", "text": "What?"}\n')
    (example,) = read_examples(str(lines))
    with pytest.raises(BadInput, match=r"x\.png: cannot be read"):
        visual_inputs(room.open(make_vlm("llava")), [example])
    with pytest.raises(BadInput, match="tiny: its processor reads no images"):
        visual_inputs(room.open(tiny_llama), [example])
    for text, message in (
        ("", "holds no example"),
        ("{", "lines.jsonl:1: is no example"),
        ('{"image": "x.png"}', "lines.jsonl:1: is no example.*'text'"),
        ('{"image": "x.png", "text": 3}', "lines.jsonl:1: is no example"),
        ('{"image": "y.png", "text": ""}', "lines.jsonl:1: no such image, got y.png"),
    ):
        lines.write_text(text)
        with pytest.raises(BadInput, match=message):
            read_examples(str(lines))
    with pytest.raises(BadInput, match="nowhere.jsonl: no such file"):
        read_examples(str(tmp_path / "nowhere.jsonl"))
