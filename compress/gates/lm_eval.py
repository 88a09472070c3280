"""`lm_eval`: on each task the candidate is worse than the reference by at most so much."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.evaluate import (
    Evaluation,
    TaskComparison,
    check_device,
    check_metric,
    check_sees,
    compare_tasks,
    documents_needed,
    load_tasks,
    reference_journal,
    run_tasks,
)
from compress.gates.base import (
    GateResult,
    ModelGateConfig,
    Row,
    Subject,
    against,
    bounded,
    eval_options,
    recorded,
    register,
    worst,
)
from compress.stages import StageConfig


class LmEvalConfig(ModelGateConfig):
    """``max_drop``: in the metric's own unit, 0.01 for one point of accuracy. ``metric``: by
    lm-eval's name, as ``acc_norm``; the first of each task by default. ``limit``: documents a task,
    below 1 a share of them.
    """

    tasks: tuple[str, ...] = Field(min_length=1)
    max_drop: float = Field(ge=0)
    metric: str | None = None
    include_path: str | None = None
    limit: int | float | None = Field(default=None, gt=0)
    num_fewshot: int | None = Field(default=None, ge=0)
    batch_size: int = Field(default=8, ge=1)
    apply_chat_template: bool = False


@register
class LmEval:
    """Documents are compared one by one, so what both models get right or wrong adds no noise.

    Passes if the upper end of the interval of the drop is at most ``max_drop`` on every task. When
    only the interval reaches beyond, the gate is undecided, which does not pass, and says how many
    documents would decide.
    """

    name: ClassVar[str] = "lm_eval"
    Config: ClassVar[type[StageConfig]] = LmEvalConfig

    def plan(self, reference: Checkpoint, config: LmEvalConfig) -> None:
        check_device(config.device)
        tasks = load_tasks(config.tasks, config.include_path)
        check_metric(tasks, config.metric)
        check_sees(tasks, reference)
        if config.apply_chat_template and not reference.tokenizer().chat_template:
            raise BadInput("its tokenizer has no chat template", where=reference.path)

    def check(self, subject: Subject, config: LmEvalConfig) -> GateResult:
        options, progress = eval_options(config), subject.progress
        kept = reference_journal(subject.reference, progress)
        before = run_tasks(subject.reference, options, kept, progress=progress)
        after = run_tasks(subject.candidate, options, subject.journal, progress=progress)
        return judge(before, after, config, subject.reference.source.id)


def judge(
    before: Evaluation, after: Evaluation, config: LmEvalConfig, reference: str
) -> GateResult:
    """The gate's verdict on two evaluations that exist already. Raises as `compare_tasks`."""
    found = compare_tasks(
        before,
        after,
        config.tasks,
        metric=config.metric,
        confidence=config.confidence,
        seed=config.seed,
    )
    rows = [_row(task, config.max_drop) for task in found]
    return GateResult(
        gate=LmEval.name,
        config=recorded(config),
        verdict=worst(rows),
        summary="; ".join(
            f"{row.name} {row.reference:.4g} → {row.candidate:.4g}, drop {against(row)}"
            for row in rows
        ),
        reference=reference,
        rows=rows,
        details={
            row.name: {
                "lost": task.comparison.lost,
                "won": task.comparison.won,
                "flips": task.comparison.flips,
                "p_value": task.comparison.p_value,
                "method": task.comparison.method,
            }
            for row, task in zip(rows, found, strict=True)
        },
    )


def _row(task: TaskComparison, max_drop: float) -> Row:
    found = task.comparison
    row = bounded(
        f"{task.task} {task.metric.removesuffix(',none')}",
        found.drop,
        max_drop,
        reference=found.reference,
        candidate=found.candidate,
        documents=found.documents,
    )
    if row.verdict == "undecided" and (needed := documents_needed(found, max_drop)):
        row.note = f"about {needed:,} documents would decide"
    return row
