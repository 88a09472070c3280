"""What prompts with fewer tokens cost, for `tokens.py`: operations, time, memory of the cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from compress.tokens import (
    SELECTORS,
    Segment,
    Selector,
    TokenPolicy,
    last_report,
    make_selector,
    predicted_flops,
    pruning,
)

PATCH = 14
IMAGE = 1  # of the random model's vocabulary


@dataclass(frozen=True, eq=False)
class Prompt:
    """A model and a question, ``ids`` int64 [length], about images of ``side`` pixels of noise."""

    model: Any
    ids: torch.Tensor
    side: int

    @property
    def tokens(self) -> int:
        """Visual ones."""
        return int((self.ids == self.model.config.image_token_index).sum())

    @property
    def layers(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def pixels(self, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, 3, self.side, self.side, generator=generator)


def enlarged(model: Any, ids: torch.Tensor, side: int) -> Prompt:
    """The same question about an image of ``side`` pixels; ``ids`` int64 [length]."""
    image = model.config.image_token_index
    [places] = (ids == image).nonzero(as_tuple=True)
    first, end = int(places[0]), int(places[-1]) + 1
    visual = torch.full(((side // PATCH) ** 2,), image)
    return Prompt(model, torch.cat([ids[:first], visual, ids[end:]]), side)


def random_llava(text: int = 75, side: int = 24 * PATCH) -> Prompt:
    """576 visual tokens before a random Llama of 12 layers of 512; the tower is of one layer."""
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=side,
        patch_size=PATCH,
    )
    language = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config=language,
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )
    ids = torch.cat([torch.tensor([0, IMAGE]), torch.randint(2, 1000, (text - 1,))])
    return enlarged(model.eval(), ids, side)


def flops(prompt: Prompt, policy: TokenPolicy | None) -> tuple[int, int]:
    """Of the language model and one token's logits: predicted, and counted while it runs."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3]))

    # What torch does not count of itself is the CPU's attention.
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    features = _seen(prompt, 1)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    lengths: Sequence[int] = [len(prompt.ids)] * prompt.layers
    with _pruned(prompt, policy), counter, torch.inference_mode():
        _read(prompt, features, 1, None)
        if policy:
            lengths = last_report(prompt.model).lengths
    return predicted_flops(prompt.model.config, lengths, logits=1), counter.get_total_flops()


def speeds(
    prompt: Prompt, policies: Mapping[str, TokenPolicy | None], rows: int, repeats: int, steps: int
) -> dict[str, dict[str, float]]:
    """The least of ``repeats`` runs, which take turns, in seconds of wall and ``cpu`` time: of
    ``prefill``, of the ``first`` token, vision tower included, and of one ``decode`` step of so
    many ``rows``; and the cache's ``bytes`` after the prompt."""
    found: dict[str, dict[str, float]] = {name: {} for name in policies}
    for _ in range(repeats):
        for name, policy in policies.items():
            for key, value in _run(prompt, policy, rows, steps).items():
                found[name][key] = min(value, found[name].get(key, value))
    return found


def _run(prompt: Prompt, policy: TokenPolicy | None, rows: int, steps: int) -> dict[str, float]:
    cache = DynamicCache()
    with _pruned(prompt, policy), torch.inference_mode():
        pixels = prompt.pixels(rows)
        marks = [_clocks()]
        features = _features(prompt, pixels)
        marks.append(_clocks())
        token = _read(prompt, features, rows, cache)
        marks.append(_clocks())
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        for _ in range(steps):
            logits = prompt.model(token, past_key_values=cache).logits
            token = logits[:, -1:].argmax(-1)
        marks.append(_clocks())
    start, seen, first, end = marks
    found = {"bytes": float(size)}
    for number, clock in enumerate(("", " cpu")):
        found[f"prefill{clock}"] = first[number] - seen[number]
        found[f"first{clock}"] = first[number] - start[number]
        found[f"decode{clock}"] = (end[number] - first[number]) / steps
    return found


class Timed:
    """A selector, and the least processor time that it took, in seconds."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self.least = float("inf")

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        start = time.process_time()
        chosen = self._selector(segment, k)
        self.least = min(self.least, time.process_time() - start)
        return chosen


def scoring(prompt: Prompt, layer: int, keep: float, repeats: int) -> dict[str, dict[str, float]]:
    """By selector the least processor time of its call on one image, of ``repeats``, as shares of
    the prefill of the ``whole`` prompt and of the one that it ``pruned``."""
    whole, found = _least(prompt, None, repeats), {}
    for name in SELECTORS:
        policy = TokenPolicy(layer, keep, name)
        timed = Timed(make_selector(name))
        pruned = _least(prompt, policy, repeats, timed)
        found[name] = {"whole": timed.least / whole, "pruned": timed.least / pruned}
    return found


def _least(
    prompt: Prompt, policy: TokenPolicy | None, repeats: int, selector: Timed | None = None
) -> float:
    features, least = _seen(prompt, 1), float("inf")
    with _pruned(prompt, policy, selector), torch.inference_mode():
        for _ in range(repeats):
            start = time.process_time()
            _read(prompt, features, 1, None)
            least = min(least, time.process_time() - start)
    return least


def _read(prompt: Prompt, features: Sequence[torch.Tensor], rows: int, cache: Any) -> torch.Tensor:
    """int64 [rows, 1]: the first token after the prompt."""
    out = prompt.model(
        prompt.ids.expand(rows, -1),
        mm_encoder_outputs={"image": SimpleNamespace(pooler_output=list(features))},
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    )
    return out.logits[:, -1:].argmax(-1)


def _seen(prompt: Prompt, rows: int) -> Sequence[torch.Tensor]:
    with torch.inference_mode():
        return _features(prompt, prompt.pixels(rows))


def _features(prompt: Prompt, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
    return prompt.model.get_image_features(pixels).pooler_output


def _pruned(prompt: Prompt, policy: TokenPolicy | None, selector: Timed | None = None) -> Any:
    return pruning(prompt.model, policy, selector=selector) if policy else nullcontext()


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
