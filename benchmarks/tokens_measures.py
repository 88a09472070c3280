"""What `tokens.py` asks of vision-language models that lose tokens, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from quantization_measures import Found, Kept
from transformers import AutoProcessor, LlavaForConditionalGeneration
from vlm import task, toy

from compress.evaluate import bootstrap_interval
from compress.stages import prune_tokens
from compress.tokens import (
    Segment,
    TokenPolicy,
    collapse_layer,
    last_report,
    layer_entropies,
    pruning,
    token_losses,
)

RANDOM, WHOLE = "random", "whole"
CHANCE = 1 / len(task.DIGITS)
HELD_OUT_SEED = 1  # what trains the models looks at held-out examples of seed 0


@dataclass(frozen=True, eq=False)
class Asked:
    """n questions, all of one length, about an image of p patches each."""

    ids: torch.Tensor
    """int64 [n, length]."""
    pixels: torch.Tensor
    """float32 [n, 3, side, side]."""
    answers: torch.Tensor
    """int64 [n]: the digits."""
    shown: torch.Tensor
    """bool [n, p]: which patches hold the digit."""

    def inputs(self) -> list[dict[str, torch.Tensor]]:
        """One by one, as the model takes them."""
        rows = zip(self.ids, self.pixels, strict=True)
        return [{"input_ids": ids[None], "pixel_values": pixels[None]} for ids, pixels in rows]


Ask = Callable[[int, task.Split, int], Asked]
"""So many questions of a split, drawn with a seed."""


class Subject:
    """A model, what to ask of it, and what it answered before."""

    def __init__(self, model: Any, ask: Ask, digits: Sequence[int], kept: Kept, batch: int) -> None:
        self.model, self.ask, self.kept, self.batch = model, ask, kept, batch
        self.digits = list(digits)
        self._held: dict[int, Held] = {}

    def answers(self, count: int, policy: TokenPolicy | None, draws: int) -> Found:
        """Of ``count`` held-out questions each: ``right``, 0 or 1, and ``shown``, the share of the
        digit's patches that was kept; of "random" the means of so many ``draws``."""
        name = f"{policy.selector} layer {policy.layer}" if policy else WHOLE
        times = draws if policy and policy.selector == RANDOM else 1
        depends = [policy and policy.to_json(), count, times]
        return self.kept(name, depends, lambda: self._answers(count, policy, times))

    def entropies(self, count: int) -> Found:
        """By layer the mean entropy of visual tokens, and where it collapses, if it does."""

        def work() -> Found:
            asked = self.ask(count, "train", 0)
            table = layer_entropies(self.model, asked.inputs())
            return {"means": table.mean(0).tolist(), "layer": collapse_layer(table)}

        return self.kept("entropies", count, work)

    def choice(self, count: int, policy: TokenPolicy, draws: int) -> Found:
        """By the rule of the stage `prune_tokens`, on training questions: the selector that loses
        least on one half, its ``losses``, and how much ``less`` it loses than chance on the other.
        """
        candidates = prune_tokens.PruneTokensConfig.model_fields["candidates"].default

        def work() -> Found:
            inputs = self.ask(count, "train", 0).inputs()
            half = count // 2
            first = token_losses(self.model, inputs[:half], policy, candidates, draws=draws)
            losses = {name: float(np.mean(each)) for name, each in first.items()}
            chosen = min(candidates, key=losses.__getitem__)
            judged = token_losses(self.model, inputs[half:], policy, [chosen], draws=draws)
            less = bootstrap_interval(
                np.mean, [np.array(judged[RANDOM]) - np.array(judged[chosen])], seed=policy.seed
            )
            ends = [less.estimate, less.low, less.high]
            return {"chosen": chosen, "losses": losses, "less": ends}

        return self.kept("choice", [policy.to_json(), count, draws, candidates], work)

    def _answers(self, count: int, policy: TokenPolicy | None, times: int) -> Found:
        if count not in self._held:
            self._held[count] = Held(self, self.ask(count, "heldout", HELD_OUT_SEED))
        found = [self._held[count].answers(policy, draw) for draw in range(times)]
        return {name: np.mean([each[name] for each in found], 0).tolist() for name in found[0]}


class Held:
    """Questions whose images are looked at once for all policies."""

    def __init__(self, subject: Subject, asked: Asked) -> None:
        self._model, self._digits, self._asked = subject.model, subject.digits, asked
        starts = range(0, len(asked.ids), subject.batch)
        self._parts = [slice(first, first + subject.batch) for first in starts]

    @cached_property
    def _features(self) -> list[torch.Tensor]:
        """Of each image, float32 [p, D]: what the projector gives."""
        see, pixels = self._model.get_image_features, self._asked.pixels
        with torch.inference_mode():
            return [image for part in self._parts for image in see(pixels[part]).pooler_output]

    def answers(self, policy: TokenPolicy | None, draw: int) -> Found:
        """Of each question, whether it is answered rightly; of its digit, what was kept."""
        asked = self._asked
        right: list[float] = []
        shown: list[float] = []
        drawn = DrawEach(draw) if policy and policy.selector == RANDOM else None
        context = pruning(self._model, policy, selector=drawn) if policy else nullcontext()
        with context, torch.inference_mode():
            for part in self._parts:
                images = {"image": SimpleNamespace(pooler_output=self._features[part])}
                out = self._model(
                    asked.ids[part], mm_encoder_outputs=images, logits_to_keep=1, use_cache=False
                )
                likeliest = out.logits[:, -1, self._digits].argmax(-1)
                right += (likeliest == asked.answers[part]).float().tolist()
                shown += self._kept(asked.shown[part]) if policy else [1.0] * len(likeliest)
        return {"right": right, "shown": shown}

    def _kept(self, shown: torch.Tensor) -> list[float]:
        """The shares of the patches ``shown``, bool [n, p], that the last forward kept."""
        segments = last_report(self._model).segments
        return [
            float(digit[segment.positions - segment.start].sum() / digit.sum())
            for digit, segment in zip(shown, segments, strict=True)
        ]


class DrawEach:
    """Chance, with a draw of its own for each image.

    The selector "random" draws by the image's place, which is the same in all of these prompts.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        return torch.randperm(len(segment.hidden), generator=self._generator)[:k].sort().values


def load(path: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def toy_subject(path: Path, kept: Kept) -> Subject:
    """What `vlm/toy.py` trains: it knows by itself which patches hold the digit."""

    def ask(count: int, split: task.Split, seed: int) -> Asked:
        drawn = toy.questions(count, split, seed=seed)
        return Asked(drawn.ids, drawn.pixels, drawn.answers, drawn.shown)

    return Subject(load(path), ask, range(10), kept, batch=100)


def vlm_subject(path: Path, kept: Kept) -> Subject:
    """What `vlm/assemble.py` puts together and `vlm/train.py` trains."""
    processor = AutoProcessor.from_pretrained(path)

    def ask(count: int, split: task.Split, seed: int) -> Asked:
        size = processor.image_processor.crop_size["height"]
        asked = list(task.examples(count, split, size=size, seed=seed))
        given = processor(
            images=[one.image for one in asked],
            text=[one.prompt for one in asked],
            return_tensors="pt",
        )
        return Asked(
            given["input_ids"],
            given["pixel_values"],
            torch.tensor([one.answer for one in asked]),
            torch.stack([_inside(one, processor.patch_size) for one in asked]),
        )

    digits = processor.tokenizer.convert_tokens_to_ids(task.DIGITS)
    return Subject(load(path), ask, digits, kept, batch=16)


def _inside(example: task.Example, patch: int) -> torch.Tensor:
    """bool [patches]: those whose centre lies in the square that holds the digit."""
    centres = torch.arange(0, example.image.shape[0], patch) + patch / 2
    top, left, side = example.box
    rows, columns = ((centres >= start) & (centres < start + side) for start in (top, left))
    return torch.outer(rows, columns).flatten()
