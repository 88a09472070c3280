"""`divergence`: the candidate's next-token distributions stay near the reference's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from compress.checkpoint import Checkpoint
from compress.evaluate import check_same_tokens, divergence
from compress.gates.base import (
    GateResult,
    Subject,
    against,
    bounded,
    finite,
    recorded,
    register,
    worst,
)
from compress.gates.perplexity import TextGateConfig
from compress.stages import StageConfig


class DivergenceConfig(TextGateConfig):
    """``max_kl``, ``max_jsd``: nats a token, at least one of them. ``top_k``: for the KL over the
    reference's most likely tokens, which is reported beside the full one."""

    max_kl: float | None = Field(default=None, gt=0)
    max_jsd: float | None = Field(default=None, gt=0)
    top_k: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _bounds_something(self) -> DivergenceConfig:
        if self.max_kl is None and self.max_jsd is None:
            raise ValueError("give max_kl or max_jsd")
        return self


@register
class DivergenceGate:
    """One pass, both models side by side; all metrics of it are reported with their intervals.

    Passes if the upper end of each bounded metric's interval is at most its bound.
    """

    name: ClassVar[str] = "divergence"
    Config: ClassVar[type[StageConfig]] = DivergenceConfig

    def plan(self, reference: Checkpoint, config: DivergenceConfig) -> None:
        config.read(reference)

    def check(self, subject: Subject, config: DivergenceConfig) -> GateResult:
        reference, candidate = subject.reference, subject.candidate
        documents = config.read(reference)
        check_same_tokens(reference.tokenizer(), candidate.tokenizer(), candidate.path)
        found = divergence(
            reference.load_model(config.dtype, config.device),
            candidate.load_model(config.dtype, config.device),
            documents,
            top_k=config.top_k,
            progress=subject.progress,
        )
        metrics = found.metrics(config.confidence, config.seed)
        bounds = {"kl": config.max_kl, "jsd": config.max_jsd}
        rows = [
            bounded(name, metrics[name], limit, unit="nats/token", documents=documents.count)
            for name, limit in bounds.items()
            if limit is not None
        ]
        return GateResult(
            gate=self.name,
            config=recorded(config),
            verdict=worst(rows),
            summary="; ".join(f"{row.name} {against(row)}" for row in rows),
            reference=reference.source.id,
            rows=rows,
            details={
                name: [finite(end) for end in (interval.estimate, interval.low, interval.high)]
                for name, interval in metrics.items()
            }
            | {"tokens": found.tokens},
        )
