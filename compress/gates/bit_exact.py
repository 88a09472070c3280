"""`bit_exact`: not one bit differs, in the tensors, in what they compute, in what is answered."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.checkpoint import (
    CONFIG,
    Checkpoint,
    Digest,
    TensorInfo,
    dense_config,
    is_document,
)
from compress.errors import BadInput
from compress.evaluate import (
    check_device,
    load_tasks,
    reference_journal,
    run_tasks,
    same_responses,
    verify,
)
from compress.gates.base import (
    GateResult,
    ModelGateConfig,
    Row,
    Subject,
    eval_options,
    recorded,
    register,
    worst,
)
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


@register
class BitExact:
    """Integers are compared, never floats: NaN payloads and the sign of zero count.

    Tensors by the sha256 of their bytes, decoded; config, tokenizer and all files that a manifest
    vouches for; logits (or the first output of a model without a head) as integers, both models run
    in the same way; task responses by the bits of their log-likelihoods. No statistics, no
    tolerance.
    """

    name: ClassVar[str] = "bit_exact"
    Config: ClassVar[type[StageConfig]] = BitExactConfig

    def plan(self, reference: Checkpoint, config: BitExactConfig) -> None:
        check_device(config.device)
        if config.prompts:
            reference.tokenizer()
        if config.tasks:
            load_tasks(config.tasks, config.include_path)

    def check(self, subject: Subject, config: BitExactConfig) -> GateResult:
        rows = [_tensors(subject), _files(subject)]
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
    reference, candidate = subject.reference, subject.candidate
    before, after = reference.tensor_infos(), candidate.tensor_infos()
    names = list({**before, **after})
    with subject.progress.step("comparing tensors", len(names), "tensors") as step:
        faults = []
        for name in names:
            if name not in before or name not in after:
                faults.append(f"{name} is in one only")
            elif _described(before[name]) != _described(after[name]):
                faults.append(f"{name} is of another dtype or shape")
            elif _sha256(reference, name) != _sha256(candidate, name):
                faults.append(name)
            step.advance(1)
    return _row("tensors", len(names), faults)


def _described(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _sha256(checkpoint: Checkpoint, name: str) -> str:
    digest = Digest(checkpoint.chunks(name))
    for _ in digest:
        pass
    return digest.hexdigest()


def _files(subject: Subject) -> Row:
    """Config, tokenizer and the like; and all that the manifest vouches for, where there is one."""
    reference, candidate = subject.reference, subject.candidate
    faults = []
    if dense_config(reference.config) != dense_config(candidate.config):
        faults.append(CONFIG)
    contents = [
        {
            path: hashlib.sha256((checkpoint.path / path).read_bytes()).digest()
            for path in checkpoint.sidecars()
            if not is_document(path)
        }
        for checkpoint in (reference, candidate)
    ]
    names = sorted(contents[0].keys() | contents[1].keys())
    faults += [path for path in names if contents[0].get(path) != contents[1].get(path)]
    if candidate.manifest is not None:
        faults += verify(candidate.path, progress=subject.progress).faults
    return _row("files", len(names) + 1, faults)


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
    return _row("logits", len(prompts), faults)


def _output(model: Any, prompt: Any, step: Any) -> torch.Tensor:
    import torch

    inputs = dict(prompt.to(next(model.parameters()).device))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode():
        output = model(**inputs)[0].cpu()
    step.advance(1)
    return output


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _responses(subject: Subject, config: BitExactConfig) -> Row:
    options, progress = eval_options(config), subject.progress
    kept = reference_journal(subject.reference, progress)
    before = run_tasks(subject.reference, options, kept, progress=progress)
    after = run_tasks(subject.candidate, options, subject.journal, progress=progress)
    every = {
        (task, sample["doc_id"])
        for task, samples in before.results["samples"].items()
        for sample in samples
    }
    if not every:
        raise BadInput("no documents", where=",".join(config.tasks))
    return _row("responses", len(every), same_responses(before, after))


def _row(name: str, total: int, faults: list[str]) -> Row:
    return Row(
        name=name,
        value=len(faults),
        limit=0,
        documents=total,
        verdict="failed" if faults else "passed",
        note=f"{faults[0]} first" if faults else "",
    )
