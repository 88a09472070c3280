"""Training of a few blocks at a time on the states that the whole model has after them.

Block-wise reconstruction as in EfficientQAT's Block-AP (arXiv 2407.11062, section 3.2), with the
guides of EdgeQAT (arXiv 2402.10787). What enters a window comes from the blocks before it as they
are quantized; what should leave it, from the model's own float weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress, Step
from compress.quant.qat.identity import check_activations, identity
from compress.quant.qat.journal import read_journal, write_journal
from compress.quant.qat.settings import QatSettings
from compress.quant.qat.trained import Trained
from compress.quant.qtensor import QTensor, Scheme
from compress.signals import check_tokens, find_blocks

if TYPE_CHECKING:
    import torch

    from compress.quant.qat.segment import Segment


def train_blockwise(
    model: Any,
    tokens: torch.Tensor,
    targets: Mapping[str, Scheme],
    settings: QatSettings,
    windows: Sequence[range],
    *,
    activations: int | None = None,
    start: Mapping[str, QTensor] | None = None,
    journal: Path | None = None,
    subject: str = "",
    progress: Progress = SILENT,
) -> Trained:
    """Train the weights ``targets``, by parameter name, window by window of blocks.

    ``model``: float32, in eval mode, on one device; it is not changed. ``tokens``: int64
    [sequences, length]. ``windows``: consecutive blocks each, in order, that do not overlap; blocks
    outside stay as they are. ``activations``: bits of the inputs of the targets, by token, None for
    floats. ``start``: quantized weights, some or all, whose scales the steps begin with.

    A window's loss is `hidden_error` of its last states, and what the settings add. The same
    threads and device give the same bits on a CPU. In memory are, beside the model, twice the
    states of all sequences at one point, four times a window's targets (copies, gradients, Adam's
    moments), and the activations of one batch in one window.

    ``journal``: a directory with a file for each window that is done; training that finds them goes
    on after them to the same bits. ``subject`` names the model, so that no journal of another is
    taken up.

    Raises `BadInput` for windows that are out of order, for targets in none of them or that are no
    linear layer's weights, asymmetric schemes, a loss that is not finite, a journal of another
    training, and as `check_tokens`; `Corrupt` for a journal that is damaged.
    """
    import torch

    from compress.quant.qat.segment import Segment

    check_tokens(model.config, tokens)
    check_activations(settings, activations)
    members = _share_out(model, targets, windows)
    start = start or {}
    bounds = [[window.start, window.stop] for window in windows]
    stated = identity(
        settings, tokens, targets, start, windows=bounds, activations=activations, subject=subject
    )
    segment = Segment(model)
    streams = _Streams(segment, tokens.to(next(model.parameters()).device))
    history: list[float] = []
    weights: dict[str, QTensor] = {}
    oscillation: dict[str, float] = {}
    errors: list[float] = []
    total = len(windows) * settings.steps
    with segment.mounted(), progress.step("training windows", total, "steps") as step:
        for index, (window, own) in enumerate(zip(windows, members, strict=True)):
            if streams.at < window.start:
                streams.advance(range(streams.at, window.start), None)
            path = journal / f"window-{index:03}.safetensors" if journal else None
            done = read_journal(path, f"{index} {stated}") if path else None
            if done is None:
                found = _train(model, streams, window, own, settings, activations, start, step)
                done = _pack(*found)
                if path:
                    write_journal(path, f"{index} {stated}", done)
            else:
                step.advance(settings.steps)
            quantized, losses, shares = _unpack(done, own)
            weights |= quantized
            history += losses
            oscillation |= shares
            dense = {
                name: partial(_same, value.dense(torch.float32).to(streams.rows.device))
                for name, value in quantized.items()
            }
            errors.append(streams.advance(window, (model, dense, settings, activations)))
    rates = {name: quantized.rate() for name, quantized in weights.items()}
    return Trained(weights, tuple(history), oscillation, rates, tuple(errors))


class _Streams:
    """All sequences' states at one point: of the float model, and with quantized blocks before."""

    def __init__(self, segment: Segment, rows: torch.Tensor) -> None:
        self.segment, self.rows, self.at = segment, rows, 0
        self._whole: list[Any] = [None] * len(rows)
        self._quantized: list[Any] = [None] * len(rows)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, Any, Any]:
        """Of some sequences the tokens and both states, [batch, length, d], None at the start."""
        import torch

        if self.at == 0:
            return self.rows[rows], None, None
        whole, quantized = (
            torch.cat([states[row] for row in rows]) for states in (self._whole, self._quantized)
        )
        return self.rows[rows], whole, quantized

    def advance(self, blocks: range, quantized: tuple[Any, ...] | None) -> float:
        """Take all sequences through ``blocks``; return the mean `hidden_error` behind them.

        ``quantized``: arguments of the `Simulation` in which the second states pass them.
        """
        import torch

        from compress.quant.qat.distill_losses import hidden_error
        from compress.quant.qat.simulation import Simulation

        total = 0.0
        for index in range(len(self.rows)):
            row, run = self.rows[index : index + 1], self.segment.run
            with torch.no_grad():
                whole = run(row, self._whole[index], blocks)
                if quantized is None:
                    other = run(row, self._quantized[index], blocks)
                else:
                    model, dense, settings, activations = quantized
                    simulation = Simulation(model, dense, settings, activations)
                    with simulation.mounted(), simulation.quantized():
                        other = run(row, self._quantized[index], blocks)
                total += float(hidden_error(other, whole))
            self._whole[index], self._quantized[index] = whole, other
        self.at = blocks.stop
        return total / len(self.rows)


def _share_out(
    model: Any, targets: Mapping[str, Scheme], windows: Sequence[range]
) -> list[dict[str, Scheme]]:
    """The targets of each window."""
    blocks, last = find_blocks(model), 0
    for window in windows:
        if not last <= window.start < window.stop <= len(blocks) or window.step != 1:
            raise BadInput(
                "windows are not in order", got=window, expected=f"within {last} to {len(blocks)}"
            )
        last = window.stop
    places = {
        id(parameter): index
        for index, block in enumerate(blocks)
        for parameter in block.parameters()
    }
    parameters = dict(model.named_parameters())
    members: list[dict[str, Scheme]] = [{} for _ in windows]
    for name, scheme in targets.items():
        if name not in parameters:
            raise BadInput("the model has no such weight", where=name)
        place = places.get(id(parameters[name]))
        found = [own for own, window in zip(members, windows, strict=True) if place in window]
        if not found:
            raise BadInput("a weight to train is in none of the windows", where=name)
        found[0][name] = scheme
    return members


def _train(
    model: Any,
    streams: _Streams,
    window: range,
    targets: Mapping[str, Scheme],
    settings: QatSettings,
    activations: int | None,
    start: Mapping[str, QTensor],
    step: Step,
) -> tuple[dict[str, QTensor], list[float], dict[str, float]]:
    import torch

    from compress.quant.qat.distill_losses import hidden_error
    from compress.quant.qat.simulation import Simulation
    from compress.quant.qat.student import (
        CLIP,
        Student,
        adam_state,
        check_loss,
        make_adam,
        pace_adam,
    )

    if not targets:
        step.advance(settings.steps)
        return {}, [], {}
    student = Student(model, targets, settings, start)
    simulation = Simulation(model, student.weights(), settings, activations)
    adam = make_adam(student, settings)
    adam_state(adam, 0)
    history: list[float] = []
    with simulation.mounted():
        for number in range(settings.steps):
            rows, whole, quantized = streams.batch(settings.rows(number, len(streams.rows)))
            student.begin(number)
            with torch.no_grad():
                target = streams.segment.run(rows, whole, window)
            teacher = simulation.clear()
            with simulation.quantized():
                output = streams.segment.run(rows, quantized, window)
            loss = hidden_error(output, target) + student.penalty(simulation.clear(), teacher)
            loss.backward()
            length = float(torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP))
            where = f"qat, blocks {window.start}-{window.stop - 1}, step {number + 1}"
            history.append(float(loss.detach()))
            check_loss(history[-1], length, where)
            pace_adam(adam, settings, number)
            adam.step()
            adam.zero_grad()
            step.advance(1)
    student.begin(settings.steps)
    quantized = {name: _on_cpu(value) for name, value in student.qtensors().items()}
    return quantized, history, student.oscillation()


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _on_cpu(value: QTensor) -> QTensor:
    return QTensor(value.codes.cpu(), value.scale.cpu(), None, value.scheme)


def _pack(
    quantized: Mapping[str, QTensor], history: Sequence[float], oscillation: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    import torch

    tensors = {f"codes.{name}": value.codes for name, value in quantized.items()}
    tensors |= {f"scale.{name}": value.scale for name, value in quantized.items()}
    tensors["history"] = torch.tensor(history, dtype=torch.float64)
    tensors["oscillation"] = torch.tensor(list(oscillation.values()), dtype=torch.float64)
    return tensors


def _unpack(
    tensors: Mapping[str, torch.Tensor], targets: Mapping[str, Scheme]
) -> tuple[dict[str, QTensor], list[float], dict[str, float]]:
    quantized = {
        name: QTensor(tensors[f"codes.{name}"], tensors[f"scale.{name}"], None, scheme)
        for name, scheme in targets.items()
    }
    shares = dict(zip(targets, tensors["oscillation"].tolist(), strict=True))
    return quantized, tensors["history"].tolist(), shares
