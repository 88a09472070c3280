"""Training of the whole model on what its float self says, on one device or on several processes.

EdgeQAT (arXiv 2402.10787), equations 15 and 16: `distillation_loss`, and the guides.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.prune import make_accelerator
from compress.quant.qat.identity import check_activations, identity
from compress.quant.qat.journal import read_journal, write_journal
from compress.quant.qat.settings import QatSettings
from compress.quant.qat.trained import Trained
from compress.quant.qtensor import QTensor, Scheme
from compress.signals import check_tokens

if TYPE_CHECKING:
    import torch


def train_full(
    model: Any,
    tokens: torch.Tensor,
    targets: Mapping[str, Scheme],
    settings: QatSettings,
    *,
    activations: int | None = None,
    start: Mapping[str, QTensor] | None = None,
    journal: Path | None = None,
    subject: str = "",
    progress: Progress = SILENT,
) -> Trained:
    """Train the weights ``targets``, by parameter name, of the whole model together.

    Arguments as for `train_blockwise`; ``journal`` is one file, rewritten every few steps. The
    loss is `distillation_loss`, a mean over a batch's sequences, and what the settings add.

    Runs where accelerate puts it: on one device, or on several processes (`accelerate launch`) that
    call this alike, share each batch, and with FSDP2 the trained weights. The same threads,
    devices and processes give the same bits on a CPU. In memory are, beside the model, four times
    the targets, one sequence's activations and several times its logits.

    Raises as `train_blockwise`, but for windows; `BadInput` for a batch that the processes cannot
    share; `Missing` without accelerate.
    """
    import torch

    from compress.quant.qat import sharded
    from compress.quant.qat.student import CLIP, adam_state, check_loss, make_adam, pace_adam
    from compress.quant.qat.whole import Whole

    accelerator = make_accelerator(settings.batch, "qat.batch")
    check_tokens(model.config, tokens)
    check_activations(settings, activations)
    if not targets:
        raise BadInput("there is nothing to train", where="qat")
    start = start or {}
    stated = identity(
        settings,
        tokens,
        targets,
        start,
        activations=activations,
        subject=subject,
        processes=accelerator.num_processes,
    )
    home = next(model.parameters()).device
    model.to(accelerator.device)
    try:
        whole = Whole(model, targets, settings, activations, start)
        prepared, wrapped = accelerator.prepare(whole, make_adam(whole, settings))
        adam = wrapped.optimizer
        kept = read_journal(journal, stated) if journal else None
        history = kept.pop("history").tolist() if kept else []
        state = {**adam_state(adam, len(history)), **whole.student.counts()}
        if kept:
            sharded.fill(state, kept)
        with (
            whole.simulation.mounted(),
            progress.step("training", settings.steps, "steps") as step,
        ):
            step.advance(len(history))
            for number in range(len(history), settings.steps):
                rows = tokens[settings.rows(number, len(tokens))]
                whole.student.begin(number)
                loss = _backward(accelerator, prepared, rows)
                length = float(accelerator.clip_grad_norm_(prepared.parameters(), CLIP))
                check_loss(loss, length, f"qat, step {number + 1}")
                pace_adam(adam, settings, number)
                adam.step()
                adam.zero_grad()
                history.append(loss)
                if journal and (number + 1 == settings.steps or not (number + 1) % settings.every):
                    tensors = sharded.gather(state)
                    tensors["history"] = torch.tensor(history, dtype=torch.float64)
                    if accelerator.is_main_process:
                        write_journal(journal, stated, tensors)
                    accelerator.wait_for_everyone()
                step.advance(1)
            whole.student.begin(settings.steps)
            weights, oscillation = prepared(None)
    finally:
        model.to(home)
    rates = {name: quantized.rate() for name, quantized in weights.items()}
    return Trained(weights, tuple(history), oscillation, rates)


def _backward(accelerator: Any, prepared: Any, rows: torch.Tensor) -> float:
    """The mean loss over all processes' rows; its gradient is left in the parameters."""
    own = rows[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
    losses: Any = 0
    for place, row in enumerate(own, 1):
        with nullcontext() if place == len(own) else accelerator.no_sync(prepared):
            loss = prepared(row)
            accelerator.backward(loss / len(own))
        losses = losses + loss.detach() / len(own)
    return float(accelerator.reduce(losses, "mean"))
