"""A tiny vision-language model whose images hold a known redundancy, trained in minutes.

`python benchmarks/vlm/toy.py OUT`. Images of 64 x 64 are 64 patches of 8 x 8. One handwritten
digit of scikit-learn stands, in one colour channel, in exactly ``copies`` patches; ``clutter``
others hold grey noise as strong as the digit, and all of them faint noise. The question names the
colour, the answer is the digit's token. What a selector of tokens must keep is therefore known: any
one of the copies. The last 397 scans are never trained on.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

GRID, PATCH = 8, 8
PATCHES = GRID * GRID
COLOURS = 3
# The vocabulary: ten digits, then these.
BOS, ASK, IMAGE, FIRST_COLOUR, VOCABULARY = 10, 11, 12, 13, 32
HELD_OUT = 397


@dataclass(frozen=True, eq=False)
class Batch:
    """Of n questions."""

    pixels: torch.Tensor
    """float32 [n, 3, 64, 64]."""
    ids: torch.Tensor
    """int64 [n, 67]: BOS, 64 image tokens, the colour, ASK."""
    answers: torch.Tensor
    """int64 [n]: the digits, which are their own tokens."""
    shown: torch.Tensor
    """bool [n, 64]: which patches hold the digit."""

    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes."""
        return {"input_ids": self.ids, "pixel_values": self.pixels}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """float [1797, 8, 8] of 0 to 1, and which digit each is."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images / 16, found.target


def questions(
    count: int,
    split: Literal["train", "heldout"],
    *,
    copies: int = 2,
    clutter: int = 16,
    seed: int | tuple[int, ...] = 0,
) -> Batch:
    """Draw ``count`` questions; ``copies`` and ``clutter`` are numbers of patches of the 64."""
    here = slice(-HELD_OUT, None) if split == "heldout" else slice(-HELD_OUT)
    scans, digits = (part[here] for part in _digits())
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(digits), size=count)
    colours = rng.integers(COLOURS, size=count)
    order = rng.permuted(np.tile(np.arange(PATCHES), (count, 1)), axis=1)
    patches = rng.normal(0, 0.1, (count, PATCHES, 3, PATCH, PATCH))
    rows = np.arange(count)[:, None]
    patches[rows, order[:, :copies], colours[:, None]] += 1.5 * scans[chosen][:, None]
    grey = rng.uniform(0, 1.2, (count, clutter, 1, PATCH, PATCH))
    patches[rows, order[:, copies : copies + clutter]] += grey
    canvas = patches.reshape(count, GRID, GRID, 3, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
    shown = np.zeros((count, PATCHES), bool)
    np.put_along_axis(shown, order[:, :copies], True, axis=1)
    text = np.full((count, PATCHES + 3), IMAGE)
    text[:, 0], text[:, -1], text[:, -2] = BOS, ASK, FIRST_COLOUR + colours
    return Batch(
        torch.from_numpy(canvas.reshape(count, 3, GRID * PATCH, GRID * PATCH)).float(),
        torch.from_numpy(text),
        torch.from_numpy(digits[chosen]),
        torch.from_numpy(shown),
    )


def tiny_llava(seed: int = 0) -> Any:
    """An untrained `LlavaForConditionalGeneration`: a ViT of one layer, a Llama of five."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=GRID * PATCH,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        bos_token_id=BOS,
        eos_token_id=ASK,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def accuracy(model: Any, asked: Batch, batch: int = 50) -> list[bool]:
    """Of each question, whether the likeliest of the ten digits is the right one."""
    right: list[bool] = []
    for first in range(0, len(asked.answers), batch):
        part = slice(first, first + batch)
        with torch.inference_mode():
            logits = model(
                input_ids=asked.ids[part], pixel_values=asked.pixels[part], logits_to_keep=1
            ).logits[:, -1, :10]
        right += (logits.argmax(-1) == asked.answers[part]).tolist()
    return right


def train(model: Any, steps: int, *, copies: int, clutter: int, seed: int, batch: int = 32) -> None:
    """Cross entropy of the answer, and a tenth of that of what each patch shows.

    The second, through a head that is thrown away, is what makes it learn to see in minutes. The
    task begins easy, with eight times the copies and an eighth of the clutter, and is the asked one
    after three eighths of the steps.
    """
    reader = torch.nn.Linear(64, 11)
    parameters = [*model.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    weight = torch.tensor([1.0] * 10 + [0.2])
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            rise, fall = step / 60, 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = 2e-3 * min(rise, fall)
        ease = max(0, 3 - 8 * step // steps)
        drawn = questions(
            batch,
            "train",
            copies=min(copies << ease, PATCHES - clutter),
            clutter=clutter >> ease,
            seed=(seed, step),
        )
        out = model(**drawn.inputs(), logits_to_keep=1)
        shown = torch.where(drawn.shown, drawn.answers[:, None], 10)
        seen = reader(out.image_hidden_states)  # [n * 64, 11]
        answer = F.cross_entropy(out.logits[:, -1, :10], drawn.answers)
        loss = answer + 0.1 * F.cross_entropy(seen, shown.flatten(), weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            held = accuracy(model, questions(200, "heldout", copies=copies, clutter=clutter))
            spent = time.perf_counter() - start
            print(
                f"step {step + 1:5}  answer {answer:.3f}  held-out {np.mean(held):.3f}"
                f"  {spent:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--copies", type=int, default=2, help="patches that hold the digit")
    parser.add_argument("--clutter", type=int, default=16, help="patches of strong grey noise")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 1 <= options.copies <= PATCHES - options.clutter:
        parser.error(f"--copies and --clutter must fit into {PATCHES} patches")
    model = tiny_llava(options.seed)
    train(
        model,
        options.steps,
        copies=options.copies,
        clutter=options.clutter,
        seed=options.seed,
    )
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
