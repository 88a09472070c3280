"""Distillation: the weights that stay learn to say what the whole model says, without the rest.

Knowledge distillation (arXiv 1503.02531, section 2) of the whole model into the one that loses some
units, which fade meanwhile: they are diluted, as attention is in "MLP Can Be A Good Transformer
Learner" (arXiv 2404.05657), so that the others can take over step by step what they did.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune.accelerated import make_accelerator
from compress.prune.distillation_journal import read_training, write_training
from compress.prune.fitness import BLOCK, Removal, Unit
from compress.signals import check_tokens, find_blocks

if TYPE_CHECKING:
    import torch

Train = Literal["projections", "norms", "all"]
_WARM = 0.05  # share of the steps over which the rate rises
_CLIP = 1.0  # the longest gradient
_PROBE = 32  # tokens that show which weights matter once the units are gone


@dataclass(frozen=True)
class Distillation:
    """How to distil.

    ``batch``: sequences a step. ``rate``: Adam's, from which it falls to 0 as a cosine. Over the
    first ``dilution`` of the steps the removed units fade from 1 to 0; 0 removes them at once, as
    suits a start that makes up for them already. ``train``: "projections" are the matrices of the
    blocks, "norms" the weights of all norms, "all" is every weight that is not tied.
    ``temperature`` divides both models' logits. ``every``: steps between two journals.
    """

    steps: int = 200
    batch: int = 4
    rate: float = 1e-4
    dilution: float = 0.0
    train: Train = "projections"
    temperature: float = 1.0
    seed: int = 0
    every: int = 20

    def __post_init__(self) -> None:
        """Raises `BadInput` for numbers that make no training."""
        for name in ("steps", "batch", "every"):
            if getattr(self, name) < 1:
                _refuse(name, getattr(self, name), "1 or more")
        for name in ("rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                _refuse(name, getattr(self, name), "a positive number")
        if not 0 <= self.dilution <= 1:
            _refuse("dilution", self.dilution, "a share of the steps, 0 to 1")
        if self.train not in get_args(Train):
            _refuse("train", self.train, f"one of {', '.join(get_args(Train))}")

    def share(self, step: int) -> float:
        """What the removed units still have in a step."""
        return max(0.0, 1 - (step + 1) / max(1.0, self.dilution * self.steps))

    def pace(self, step: int) -> float:
        """The rate of a step."""
        rise = min(1.0, (step + 1) / max(1.0, _WARM * self.steps))
        return self.rate * rise * (1 + math.cos(math.pi * step / self.steps)) / 2

    def rows(self, step: int, count: int) -> list[int]:
        """Which of ``count`` sequences a step sees: all of them in turn, shuffled each time round.

        It depends on nothing before it, so that going on after an interruption takes no state.
        """
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self._shuffled(place // count, count)[place % count] for place in places]

    def _shuffled(self, turn: int, count: int) -> list[int]:
        order = list(range(count))
        random.Random(f"{self.seed}/{turn}").shuffle(order)
        return order


def _refuse(name: str, got: object, expected: str) -> NoReturn:
    raise BadInput("makes no training", where=f"distillation.{name}", got=got, expected=expected)


@dataclass(frozen=True)
class Distilled:
    """What training gave.

    ``weights``: all that changed, float32 on the CPU, by the model's parameter name; ``history``:
    the loss of each step.
    """

    weights: dict[str, torch.Tensor]
    history: tuple[float, ...]


def distill(
    model: Any,
    tokens: torch.Tensor,
    removed: Removal,
    settings: Distillation,
    *,
    parts: Mapping[Unit, torch.nn.Module] | None = None,
    start: Mapping[str, torch.Tensor] = {},
    journal: Path | None = None,
    subject: str = "",
    progress: Progress = SILENT,
) -> Distilled:
    """Train the model without the units ``removed`` on what the whole one says about ``tokens``.

    ``model``: float32, in eval mode, on one device; as it was afterwards. ``tokens``: int64
    [sequences, length]. ``parts``: as in `RemovalLoss`. ``start``: weights to begin from instead of
    the model's, by parameter name; those that are not trained stay as given, and all of them are in
    the result. The loss is ``temperature^2 * KL(whole || pruned)`` of the next-token distributions
    at that temperature in nats, averaged over a batch's tokens.

    Weights that matter to the removed units only, and tied ones, are not trained. Those that are
    trained are held four times more: copied, their gradients, Adam's two moments. Beside them the
    memory is that of one sequence's activations and three times its logits.

    Runs where accelerate puts it: on one device, or on several processes (`accelerate launch`) that
    call this alike and share each batch. The same threads, devices and processes give the same bits
    on a CPU. The ``journal`` is rewritten every few steps, and training that finds one goes on from
    there to the bits that it would have had uninterrupted; ``subject`` names the model, so that no
    journal of another is taken up.

    Raises `BadInput` for a unit or a start that the model has not, where nothing is left to train,
    for a batch that the processes cannot share, a loss that is not finite, a journal of another
    training, and as `check_tokens`; `Corrupt` for a journal that is damaged; `Missing` without
    accelerate.
    """
    import torch

    from compress.prune.student import Gates, Student, borrowed, trainable, weights_to_own

    accelerator = make_accelerator(settings.batch, "distillation.batch")
    check_tokens(model.config, tokens)
    gates = Gates(_modules(model, removed, parts or {}))
    with ExitStack() as stack:
        stack.enter_context(borrowed(model, accelerator.device))
        stack.enter_context(gates.mounted())
        trained = trainable(model, gates, tokens[0, :_PROBE], settings.train)
        weights = weights_to_own(model, trained, start)
        student = Student(model, gates, weights, trained, settings.temperature)
        adam = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
        state = _state(adam, trained)
        identity = _identity(settings, removed, tokens, start, subject)
        history = read_training(journal, identity, state) if journal else []
        for moments in adam.state.values():
            moments["step"] += len(history)
        prepared = accelerator.prepare_model(student)
        with progress.step("distilling", settings.steps, "steps") as step:
            step.advance(len(history))
            for number in range(len(history), settings.steps):
                rows = tokens[settings.rows(number, len(tokens))]
                loss = _backward(accelerator, prepared, rows, settings.share(number))
                length = float(accelerator.clip_grad_norm_(student.parameters(), _CLIP))
                if not math.isfinite(loss + length):
                    raise BadInput(
                        "the loss is not finite",
                        where=f"distillation, step {number + 1}",
                        got=f"{loss}, with a gradient of {length}",
                        mend="lower distillation.rate",
                    )
                adam.param_groups[0]["lr"] = settings.pace(number)
                adam.step()
                adam.zero_grad()
                history.append(loss)
                due = number + 1 == settings.steps or (number + 1) % settings.every == 0
                if journal and due and accelerator.is_main_process:
                    write_training(journal, identity, state, history)
                step.advance(1)
        changed = {name: value.detach().cpu() for name, value in student.weights().items()}
    return Distilled(changed, tuple(history))


def _backward(accelerator: Any, student: Any, rows: torch.Tensor, share: float) -> float:
    """The mean loss over all processes' rows; its gradient is left in the student's parameters."""
    own = rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    losses: Any = 0
    for place, row in enumerate(own, 1):
        last = place == len(own)
        with nullcontext() if last else accelerator.no_sync(student):
            back, loss = student(row, share)
            accelerator.backward(back / len(own))
        losses = losses + loss / len(own)
    return float(accelerator.reduce(losses, "mean"))


def _modules(
    model: Any, removed: Removal, parts: Mapping[Unit, torch.nn.Module]
) -> dict[Unit, torch.nn.Module]:
    """What to gate. In the order of the units, whatever a set's is."""
    known = {(BLOCK, index): block for index, block in enumerate(find_blocks(model))} | dict(parts)
    if strange := removed - known.keys():
        kind, index = min(strange)
        raise BadInput(
            "no such unit to remove",
            got=f"{kind} {index}",
            expected=f"one of {len(known) - len(parts)} blocks or {len(parts)} parts",
        )
    return {unit: known[unit] for unit in sorted(removed)}


def _state(adam: Any, trained: Sequence[str]) -> dict[str, torch.Tensor]:
    """All that a step changes, by name; Adam's moments, which it would make in its first step."""
    import torch

    state: dict[str, torch.Tensor] = {}
    for name, parameter in zip(trained, adam.param_groups[0]["params"], strict=True):
        moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        state |= {f"weight.{name}": parameter.detach()}
        state |= {f"{kind}.{name}": moment for kind, moment in moments.items()}
    return state


def _identity(
    settings: Distillation,
    removed: Removal,
    tokens: torch.Tensor,
    start: Mapping[str, torch.Tensor],
    subject: str,
) -> str:
    """What the result depends on, but for how often it is kept."""
    stated = asdict(settings)
    del stated["every"]
    digests = {name: _sha256(value) for name, value in sorted(start.items())}
    return json.dumps(
        {
            "settings": stated,
            "removed": sorted(removed),
            "tokens": [list(tokens.shape), _sha256(tokens)],
            "start": digests,
            "subject": subject,
        },
        sort_keys=True,
    )


def _sha256(value: torch.Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().numpy()).hexdigest()
