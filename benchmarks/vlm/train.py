"""Train the projector of an assembled model: `python benchmarks/vlm/train.py DIR`.

Both towers stay frozen. First the projector alone, in a minute: its weights are set so that what it
gives has the mean norm of a token's embedding, and it learns to point each patch that shows the
digit towards the language model's own embedding of that digit. Then through the language model:
cross entropy of the answer over the ten digits.

Resumable to the bit from DIR/training/journal.safetensors; every evaluation writes the projector
into DIR, which stays a whole checkpoint throughout.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from features import Seen, seen
from safetensors import safe_open
from safetensors.torch import load_file, save
from task import DIGITS, HELD_OUT, PROMPT
from transformers import AutoProcessor, LlavaForConditionalGeneration

from compress.checkpoint import write_atomic
from compress.errors import BadInput

WARM_UP = 50
# A patch shows the digit where at least this share of it is covered.
SHOWS = 0.5
# Of cosines as logits. Digits' embeddings have 0.6 in common.
SHARPNESS = 20.0


class Answers:
    """The language model's answers for projected features, of a prompt that is always the same."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.requires_grad_(False).eval()
        self.projector = model.model.multi_modal_projector.requires_grad_(True)
        text = PROMPT.replace(
            processor.image_token, processor.image_token * model.config.image_seq_length
        )
        self.ids = processor.tokenizer(text, return_tensors="pt").input_ids
        self.digits = processor.tokenizer.convert_tokens_to_ids(DIGITS)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [n, 10] logits of the digits, of features [n, patches, 384]."""
        projected = self.projector(features.float())
        images = {"image": SimpleNamespace(pooler_output=list(projected))}
        ids = self.ids.expand(len(features), -1)
        out = self.model(ids, mm_encoder_outputs=images, logits_to_keep=1, use_cache=False)
        return out.logits[:, -1, self.digits]


def standardised(data: Seen, like: Seen) -> Seen:
    """By the mean and deviation of each of the 384 features of ``like``.

    The tower's features are small: on them as they are, Adam's steps would be too small for the
    first layer. `write_projector` folds this into that layer's weights.
    """
    mean, std = moments(like)
    return Seen((data.features.float() - mean).div_(std).half(), data.answers, data.covered)


def moments(data: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    few = data.features[:400].float().flatten(0, 1)
    return few.mean(0), few.std(0)


def initialise(projector: Any, features: torch.Tensor, embedding: torch.Tensor, seed: int) -> None:
    """Random, but what goes out has the mean norm of the embedding's rows."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (projector.linear_1, projector.linear_2):
        layer.weight.data.normal_(0, layer.in_features**-0.5, generator=generator)
        layer.bias.data.zero_()
    with torch.no_grad():
        norm = projector(features[:64].float()).norm(dim=-1).mean()
    projector.linear_2.weight.data *= embedding.norm(dim=-1).mean() / norm


def patch_loss(projector: Any, batch: Seen, digits: torch.Tensor) -> torch.Tensor:
    """Cross entropy of what each patch shows: a digit or, in place of an eleventh, nothing.

    The logits are cosines with the digits' embeddings. That of nothing is constant: background may
    look like anything but a digit.
    """
    given = F.normalize(projector(batch.features.float()), dim=-1)
    logits = SHARPNESS * given @ F.normalize(digits, dim=-1).T
    nothing = logits.new_full((*logits.shape[:2], 1), 0.3 * SHARPNESS)
    shown = torch.where(batch.covered >= SHOWS, batch.answers[:, None], len(DIGITS))
    weight = torch.tensor([1.0] * len(DIGITS) + [0.3])
    return F.cross_entropy(torch.cat([logits, nothing], -1).flatten(0, 1), shown.flatten(), weight)


def learn_patches(
    projector: Any,
    data: Seen,
    held: Seen,
    digits: torch.Tensor,
    steps: int,
    seed: int,
    batch: int = 32,
) -> None:
    """The cheap stage, without the language model."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        loss = patch_loss(
            projector, data[torch.randint(len(data), (batch,), generator=generator)], digits
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            with torch.no_grad():
                unseen = patch_loss(projector, held, digits)
            print(f"patches, step {step + 1:5}  loss {loss:.3f}  held-out {unseen:.3f}", flush=True)


class Journal:
    """The projector, the optimizer's moments and the next step, in one file that is whole."""

    def __init__(
        self, path: Path, projector: Any, optimizer: Any, settings: dict[str, Any]
    ) -> None:
        self.path, self.projector, self.optimizer = path, projector, optimizer
        self.settings = json.dumps(settings, sort_keys=True)

    def write(self, step: int) -> None:
        tensors = {f"projector.{name}": w for name, w in self.projector.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        metadata = {"step": str(step), "settings": self.settings}
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        write_atomic(self.path, save(tensors, metadata))

    def read(self) -> int | None:
        """Put back what it holds; returns the next step, or None where there is no journal."""
        if not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        if metadata["settings"] != self.settings:
            raise BadInput(
                "begun with other settings",
                where=self.path,
                got=self.settings,
                expected=metadata["settings"],
                mend="repeat those or remove the file",
            )
        whole = self.optimizer.state_dict()
        for name, tensor in load_file(self.path).items():
            kind, rest = name.split(".", 1)
            if kind == "projector":
                self.projector.get_parameter(rest).data.copy_(tensor)
            else:
                number, field = rest.split(".")
                whole["state"].setdefault(int(number), {})[field] = tensor
        self.optimizer.load_state_dict(whole)
        return int(metadata["step"])


def evaluate(answers: Answers, data: Seen, count: int, batch: int = 16) -> tuple[float, float]:
    """Accuracy on the first ``count``, and cross entropy over the ten digits (log 10 by chance)."""
    with torch.inference_mode():
        parts = data.features[:count].split(batch)
        logits = torch.cat([answers(part) for part in parts])
    right = data.answers[:count]
    return (logits.argmax(-1) == right).float().mean().item(), F.cross_entropy(logits, right).item()


def write_projector(
    directory: Path, projector: Any, mean: torch.Tensor, std: torch.Tensor, said: str
) -> None:
    """Into the checkpoint, whose other tensors keep their bytes; for features as they are."""
    new = {name: weight.detach().clone() for name, weight in projector.state_dict().items()}
    new["linear_1.weight"] /= std
    new["linear_1.bias"] -= new["linear_1.weight"] @ mean
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, weight in new.items():
        (stored,) = [key for key in tensors if key.endswith(f"multi_modal_projector.{name}")]
        tensors[stored] = weight
    write_atomic(path, save(tensors, {"format": "pt"}))
    readme = directory / "README.md"
    text = re.sub(r"(\| projector \|[^|]*\|)[^|]*\|", rf"\1 {said} |", readme.read_text())
    write_atomic(readme, text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="what assemble.py wrote")
    parser.add_argument(
        "--images", type=int, default=5600, help="training images, seen once or more"
    )
    parser.add_argument("--patch-steps", type=int, default=800, help="without the language model")
    parser.add_argument("--steps", type=int, default=400, help="through the language model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=50, help="steps from evaluation to evaluation")
    parser.add_argument("--held-out", type=int, default=200, help="images of an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options)


def train(options: argparse.Namespace) -> None:
    directory, work = options.directory, options.directory / "training"
    work.mkdir(exist_ok=True)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(directory)
    data = seen(model, processor, options.images, "train", work, options.seed)
    held = seen(model, processor, HELD_OUT, "heldout", work, options.seed)
    mean, std = moments(data)
    held, data = standardised(held, data), standardised(data, data)
    answers = Answers(model, processor)
    projector = answers.projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=options.rate, weight_decay=0.01)
    kept = ("images", "patch_steps", "steps", "batch", "rate", "seed")
    settings = {name: getattr(options, name) for name in kept}
    journal = Journal(work / "journal.safetensors", projector, optimizer, settings)
    first = journal.read()
    if first is None:
        embedding = model.get_input_embeddings().weight.detach()
        initialise(projector, data.features, embedding, options.seed)
        digits = embedding[answers.digits]
        learn_patches(projector, data, held, digits, options.patch_steps, options.seed)
        first = 0
        journal.write(first)
    start = time.perf_counter()
    for step in range(first, options.steps + 1):
        if step % options.every == 0 or step == options.steps:
            share, loss = evaluate(answers, held, options.held_out)
            line = f"step {step:5}  held-out accuracy {share:.3f}  loss {loss:.3f}"
            print(f"{line}  {time.perf_counter() - start:.0f} s", flush=True)
            journal.write(step)
            said = f"trained for {step} steps of {options.batch} (train.py), float32"
            write_projector(directory, projector, mean, std, said)
        if step == options.steps:
            break
        for group in optimizer.param_groups:
            rise, fall = (step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / options.steps)
            group["lr"] = options.rate * min(rise, fall)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        batch = data[torch.randint(len(data), (options.batch,), generator=generator)]
        loss = F.cross_entropy(answers(batch.features), batch.answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1:5}  loss {loss:.3f}", flush=True)
            journal.write(step + 1)


if __name__ == "__main__":
    main()
