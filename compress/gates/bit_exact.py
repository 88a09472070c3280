"""`bit_exact`: not one bit differs, in the tensors, in what they compute, in what is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.evaluate import (
    EvalOptions,
    load_tasks,
    reference_journal,
    run_tasks,
    same_responses,
    verify,
)
from compress.gates.base import GateResult, ModelGateConfig, Row, Subject, recorded, register, worst
from compress.stages import StageConfig

if TYPE_CHECKING:
    import torch

_PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 5, 8, 13,",
    "Water boils at one hundred degrees, and freezes at",
    "Dear Anna,\n\nthank you for your letter of the third of May.",
    "¿Dónde está la biblioteca? Où est la gare? 図書館はどこですか。",
    "Entropy is the average number of bits that",
    "To be, or not to be, that is the",
)


class BitExactConfig(ModelGateConfig):
    """``prompts``: how many fixed prompts to compare logits on, 0 to 8. ``tasks``: lm-eval tasks
    whose responses must be identical on the first ``limit`` documents; none by default."""

    prompts: int = Field(default=4, ge=0, le=len(_PROMPTS))
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int = Field(default=20, ge=1)
    batch_size: int = Field(default=8, ge=1)

    def options(self) -> EvalOptions:
        return EvalOptions(
            tasks=self.tasks,
            include_path=self.include_path,
            limit=self.limit,
            batch_size=self.batch_size,
            dtype=self.dtype,
            device=self.device,
            seed=self.seed,
        )


@register
class BitExact:
    """Integers are compared, never floats: NaN payloads and the sign of zero count.

    Tensors by the sha256 of their bytes, against the manifest and against the original; logits (or
    the first output of a model without a head) as integers, both models run in the same way; task
    responses by the bits of their log-likelihoods. No statistics, no tolerance.
    """

    name: ClassVar[str] = "bit_exact"
    Config: ClassVar[type[StageConfig]] = BitExactConfig

    def plan(self, reference: Checkpoint, config: BitExactConfig) -> None:
        if config.prompts:
            reference.tokenizer()
        if config.tasks:
            load_tasks(config.tasks, config.include_path)

    def check(self, subject: Subject, config: BitExactConfig) -> GateResult:
        rows = [_tensors(subject)]
        if config.prompts:
            rows.append(_logits(subject, config))
        if config.tasks:
            rows.append(_responses(subject, config))
        verdict = worst(rows)
        checked = ", ".join(f"{row.documents} {row.name}" for row in rows)
        differ = ", ".join(
            f"{row.value:.0f} of {row.documents} {row.name} differ ({row.note})"
            for row in rows
            if row.value
        )
        return GateResult(
            gate=self.name,
            config=recorded(config),
            verdict=verdict,
            summary=differ or f"every bit the same: {checked}",
            reference=subject.reference.source.id,
            rows=rows,
        )


def _tensors(subject: Subject) -> Row:
    report = verify(subject.candidate.path, subject.reference.path, progress=subject.progress)
    faults = [
        *report.faults,
        *(f"{name}: removed" for name in report.dropped),
        *(f"{name}: of another dtype" for name in report.not_compared),
    ]
    return _row("tensors", len(faults), len(subject.reference.tensor_infos()), faults)


def _logits(subject: Subject, config: BitExactConfig) -> Row:
    tokenizer = subject.reference.tokenizer()
    prompts = [tokenizer(text, return_tensors="pt") for text in _PROMPTS[: config.prompts]]
    outputs = []
    for title, checkpoint in (
        ("reference", subject.reference),
        ("candidate", subject.candidate),
    ):
        model = checkpoint.load_model(config.dtype, config.device)
        with subject.progress.step(f"logits of the {title}", len(prompts), "prompts") as step:
            outputs.append([_output(model, prompt, step) for prompt in prompts])
        del model
    faults = [
        f"prompt {i}"
        for i, (before, after) in enumerate(zip(*outputs, strict=True))
        if not _equal_bits(before, after)
    ]
    return _row("logits", len(faults), len(prompts), faults)


def _output(model: Any, prompt: Any, step: Any) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        output = model(**prompt.to(next(model.parameters()).device))[0].cpu()
    step.advance(1)
    return output


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _responses(subject: Subject, config: BitExactConfig) -> Row:
    options, progress = config.options(), subject.progress
    before = run_tasks(
        subject.reference, options, reference_journal(subject.reference), progress=progress
    )
    after = run_tasks(subject.candidate, options, subject.journal, progress=progress)
    total = sum(len(samples) for samples in before.results["samples"].values())
    if not total:
        raise BadInput("no documents", where=",".join(config.tasks))
    faults = same_responses(before, after)
    return _row("responses", len(faults), total, faults)


def _row(name: str, differ: int, total: int, faults: list[str]) -> Row:
    return Row(
        name=name,
        value=differ,
        limit=0,
        documents=total,
        verdict="failed" if differ else "passed",
        note=f"{faults[0]} first" if faults else "",
    )
