"""Tiny random models with visual tokens, and prompts for them, of many families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

IMAGE, VIDEO, START, END = 90, 91, 92, 93
LAYERS = 5
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
QWEN_VISION = {
    "depth": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
LLAVA = {"vision_feature_layer": -1, "image_token_index": IMAGE}
ANYRES = {"image_grid_pinpoints": [[16, 16], [16, 32]], **LLAVA}
SETTINGS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": CLIP, **LLAVA},
    "llava_next": {"vision_config": CLIP, **ANYRES},
    "llava_onevision": {
        "vision_config": SIGLIP,
        "vision_feature_select_strategy": "full",
        "video_token_index": VIDEO,
        **ANYRES,
    },
    "qwen2_vl": {"vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32}},
    "qwen2_5_vl": {"vision_config": {**QWEN_VISION, "window_size": 16}},
    "qwen3_vl": {
        "vision_config": {
            **QWEN_VISION,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        }
    },
    "idefics3": {"vision_config": {**VISION, "patch_size": 2}},
    "smolvlm": {"vision_config": {**VISION, "patch_size": 2}},
    "internvl": {"vision_config": {**VISION, "patch_size": [2, 2], "image_size": [16, 16]}},
    "gemma3": {"vision_config": {**SIGLIP, "patch_size": 2}, "mm_tokens_per_image": 16},
    "paligemma": {"vision_config": SIGLIP, "projection_dim": 32},
}
BACKBONES = {
    "llava": "llama",
    "llava_next": "mistral",
    "llava_onevision": "qwen2",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "idefics3": "llama",
    "smolvlm": "llama",
    "internvl": "qwen3",
    "gemma3": "gemma3_text",
    "paligemma": "gemma",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 256, "sliding_window_pattern": 3},
    "gemma2": {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen3_vl_text": {"rope_parameters": MROPE},
    "gpt2": {
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def randomized(model: Any) -> Any:
    """As initialised, layers change next to nothing."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@dataclass(frozen=True)
class Tiny:
    """A model and prompts for it. In a prompt, a number is that many text tokens."""

    family: str
    model: Any

    def inputs(
        self, rows: Sequence[Sequence[int | str]], side: str = "left", first: int = 0
    ) -> dict[str, Any]:
        """What the model takes for ``rows`` such as ``[[3, "image", 5], [2, "video", 4]]``.

        What a row holds depends on its number alone; ``first``: that of the first one.
        """
        import torch

        sequences, pictures = [], []
        for number, row in enumerate(rows, first):
            generator = torch.Generator().manual_seed(number)
            ids: list[int] = []
            for place, part in enumerate(row):
                if isinstance(part, int):
                    ids += torch.randint(10, 60, (part,), generator=generator).tolist()
                else:
                    token = IMAGE if part == "image" else VIDEO
                    for tokens in self.tokens(part, place):
                        ids += [START, *[token] * tokens, END]
            sequences.append(ids)
            pictures.append(self._pictures(row, generator))
        length = max(map(len, sequences))
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        for i, ids in enumerate(sequences):
            span = slice(length - len(ids), None) if side == "left" else slice(len(ids))
            tokens[i, span], mask[i, span] = torch.tensor(ids), 1
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.family.startswith("qwen") and "vl" in self.family:
            inputs["mm_token_type_ids"] = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
        if self.family == "gpt2":  # which learns places, and counts padding
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if self.family == "gemma3":
            inputs["token_type_ids"] = (tokens == IMAGE).int()
        if self.family == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(tokens)
        for name in sorted({name for found in pictures for name in found}):
            parts = [found[name] for found in pictures if name in found]
            if self.family in ("idefics3", "smolvlm"):  # images of a row, filled up with zeros
                most = max(len(part) for part in parts)
                full = torch.zeros(len(rows), most, 3, 16, 16)
                for i, found in enumerate(pictures):
                    if name in found:
                        full[i, : len(found[name])] = found[name]
                parts = [full]
            inputs[name] = torch.cat(parts)
        return inputs

    def tokens(self, part: str, place: int) -> list[int]:
        """How many tokens stand for the image or video at ``place`` of its row, run by run."""
        if self.family.startswith("qwen"):
            frames, h, w = self._grid(part, place)
            runs = frames if self.family == "qwen3_vl" else 1  # it writes the time between frames
            return [frames * h * w // 4 // runs] * runs
        if self.family == "llava_onevision" and part == "video":
            return [2 * 4 + 1]  # each frame pooled to 2 by 2, and a line end
        return [{"llava_next": 36, "llava_onevision": 36}.get(self.family, 16)]

    @staticmethod
    def _grid(part: str, place: int) -> tuple[int, int, int]:
        return (2 if part == "video" else 1), 8, (8, 12)[place // 2 % 2]

    def _pictures(self, row: Sequence[int | str], generator: Any) -> dict[str, Any]:
        """The pixels of a row's images and videos, and what goes with them."""
        import torch

        found: dict[str, Any] = {}
        for kind, suffix in (("image", ""), ("video", "_videos")):
            places = [place for place, part in enumerate(row) if part == kind]
            if not places:
                continue
            shape: tuple[int, ...] = (len(places), 3, 16, 16)
            if self.family.startswith("qwen"):
                grids = torch.tensor([self._grid(kind, place) for place in places])
                found[f"{kind}_grid_thw"] = grids
                shape = int(grids.prod(1).sum()), 3 * 2 * 16
            elif kind == "video" or self.family in ("llava_next", "llava_onevision"):
                shape = (len(places), 2, 3, 16, 16)  # frames, or the whole image and its tiles
                if kind == "image":
                    found["image_sizes"] = torch.tensor([[16, 16]] * len(places))
            found[f"pixel_values{suffix}"] = torch.randn(shape, generator=generator)
        return found


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Tiny]:
    """A random model of a family, of vision and text or of text alone. Shared: leave it alone."""
    made: dict[str, Tiny] = {}

    def make(family: str, attention: str = "sdpa", **options: Any) -> Tiny:
        key = repr((family, attention, options))
        if key not in made:
            made[key] = build(family, attention, options)
        return made[key]

    return make


def build(family: str, attention: str, options: dict[str, Any]) -> Tiny:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    backbone = BACKBONES.get(family, family)
    text = {} if backbone == "gpt2" else TEXT
    text = {"vocab_size": 97, **text, **OPTIONS.get(backbone, {}), **options}
    if family not in SETTINGS:
        config = AutoConfig.for_model(family, **text)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return Tiny(family, randomized(model))
    ids = {} if "image_token_index" in SETTINGS[family] else {"image_token_id": IMAGE}
    if family.startswith("qwen"):
        ids |= {"video_token_id": VIDEO, "vision_start_token_id": START}
    text = {"model_type": backbone, **text}
    config = AutoConfig.for_model(family, text_config=text, **ids, **SETTINGS[family])
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    return Tiny(family, randomized(model))
