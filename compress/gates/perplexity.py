"""`perplexity`: the candidate's perplexity is at most so many times the reference's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.checkpoint import Checkpoint
from compress.errors import BadInput
from compress.evaluate import (
    FEWEST,
    Documents,
    check_causal,
    check_device,
    check_same_tokens,
    losses,
    perplexity,
    perplexity_ratio,
    read_documents,
)
from compress.gates.base import (
    GateResult,
    ModelGateConfig,
    Subject,
    against,
    bounded,
    recorded,
    register,
)
from compress.stages import StageConfig


class TextGateConfig(ModelGateConfig):
    """``data``: as for calibration; ``documents``: at most so many; ``length``: tokens a window."""

    data: str = "builtin:heldout"
    documents: int | None = Field(default=None, ge=FEWEST)
    length: int = Field(default=512, ge=8)

    def read(self, reference: Checkpoint) -> Documents:
        """The held-out documents in the reference's tokens.

        Raises `BadInput` where it is no causal language model, its context is too short or the
        documents are too few for an interval, and as `read_documents`.
        """
        check_device(self.device)
        check_causal(reference)
        documents = read_documents(
            self.data,
            reference.tokenizer(),
            length=self.length,
            limit=self.documents,
            seed=self.seed,
        )
        if documents.count < FEWEST:
            raise BadInput(
                "too few documents to tell anything by",
                where=self.data,
                got=documents.count,
                expected=f"{FEWEST} or more",
            )
        return documents


class PerplexityConfig(TextGateConfig):
    """``max_ratio``: of the candidate's perplexity to the reference's."""

    max_ratio: float = Field(gt=0)


@register
class Perplexity:
    """Both models score the same documents; documents are resampled in pairs (BCa bootstrap).

    Passes if the upper end of the interval of the ratio is at most ``max_ratio``. One model is in
    memory at a time.
    """

    name: ClassVar[str] = "perplexity"
    Config: ClassVar[type[StageConfig]] = PerplexityConfig

    def plan(self, reference: Checkpoint, config: PerplexityConfig) -> None:
        config.read(reference)

    def check(self, subject: Subject, config: PerplexityConfig) -> GateResult:
        reference, candidate = subject.reference, subject.candidate
        documents = config.read(reference)
        check_same_tokens(reference.tokenizer(), candidate.tokenizer(), candidate.path)
        scored = [
            losses(
                checkpoint.load_model(config.dtype, config.device),
                documents,
                progress=subject.progress,
                whose=f"the {title}",
            )
            for title, checkpoint in (("reference", reference), ("candidate", candidate))
        ]
        ratio = perplexity_ratio(*scored, confidence=config.confidence, seed=config.seed)
        row = bounded(
            "perplexity ratio",
            ratio,
            config.max_ratio,
            reference=perplexity(scored[0]),
            candidate=perplexity(scored[1]),
            documents=documents.count,
        )
        return GateResult(
            gate=self.name,
            config=recorded(config),
            verdict=row.verdict,
            summary=f"perplexity {row.reference:.2f} → {row.candidate:.2f}, ratio " + against(row),
            reference=reference.source.id,
            rows=[row],
            details={"tokens": int(scored[0][:, 1].sum())},
        )
