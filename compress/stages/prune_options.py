"""The options of `prune_blocks`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.errors import did_you_mean
from compress.prune import RULES, SEARCHES, Distillation, Evolution
from compress.stages.base import StageConfig


class BudgetConfig(StageConfig):
    """The share of the whole model, between 0 and 1, that is to go at least: one of these."""

    parameters: float | None = Field(default=None, gt=0, lt=1)
    flops: float | None = Field(default=None, gt=0, lt=1)
    coded_bytes: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("a budget is one of parameters, flops and coded_bytes")
        return self

    @property
    def stated(self) -> tuple[str, float]:
        """The measure and the share."""
        [(measure, share)] = self.model_dump(exclude_none=True).items()
        return measure, share


class EvolutionConfig(StageConfig):
    """See `compress.prune.Evolution`."""

    generations: int | None = Field(default=None, ge=0)
    offspring: int = Field(default=32, ge=1)
    survivors: tuple[int, ...] = (2, 1)
    tokens: tuple[int, ...] = (2048, 32768)
    swaps: int = Field(default=3, ge=1)

    def settings(self, seed: int) -> Evolution:
        """Raises `BadInput` for stages that make no selection."""
        return Evolution(**self.model_dump(), seed=seed)


class DistillationConfig(StageConfig):
    """See `compress.prune.Distillation`."""

    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=4, ge=1)
    rate: float = Field(default=1e-4, gt=0)
    dilution: float = Field(default=0.0, ge=0, le=1)
    train: Literal["projections", "norms", "all"] = "projections"
    temperature: float = Field(default=1.0, gt=0)
    every: int = Field(default=20, ge=1)

    def settings(self, seed: int) -> Distillation:
        """Raises nothing: the bounds are the same."""
        return Distillation(**self.model_dump(), seed=seed)


def _known(names: Sequence[str], name: str) -> str:
    if name not in names:
        raise ValueError(f"'{name}' is not known, {did_you_mean(name, names)}")
    return name


class PruneBlocksConfig(StageConfig):
    """Either ``drop``, a number of units, or a ``budget``.

    ``granularity``: what a unit is, a whole block, its attention, its MLP, or either of the two.
    ``heal``: "auto" is "linear" for models that it is made for, and "none" for others.
    ``protect``: indices of blocks that stay; by default the first two and the last.
    """

    granularity: Literal["block", "attention", "mlp", "joint"] = "block"
    drop: int | None = Field(default=None, ge=1)
    budget: BudgetConfig | None = None
    scorer: Annotated[str, AfterValidator(partial(_known, RULES))] = "knn_entropy"
    search: Annotated[str, AfterValidator(partial(_known, SEARCHES))] = "one_shot"
    evolution: EvolutionConfig = EvolutionConfig()
    heal: Literal["none", "auto", "linear", "distill"] = "none"
    distillation: DistillationConfig = DistillationConfig()
    protect: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _one_goal(self) -> PruneBlocksConfig:
        if (self.drop is None) == (self.budget is None):
            raise ValueError("it takes either drop or budget")
        return self
