"""The options of `quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field, model_validator

from compress.quant import LevelSearch
from compress.stages.base import StageConfig

if TYPE_CHECKING:
    import torch

    from compress.quant import QatSettings, ScaleDtype

BNB = ("nf4", "int8")
_OF = {
    "ecsq": {"bits_per_weight", "max_perplexity_ratio", "rdo", "sensitivity", "super_weights"},
    "rtn": {"bits", "group", "symmetric"},
    "nf4": {"double_quant"},
    "int8": set[str](),
}


class WeightsConfig(StageConfig):
    """``method``: "ecsq", with steps as wide as a rate asks; "rtn", of a fixed width; "nf4" and
    "int8", bitsandbytes' own.

    Of ecsq: either ``bits_per_weight`` of all quantized matrices together, or
    ``max_perplexity_ratio``, for which the least rate is looked for on the calibration text;
    ``rdo``, the lambda of rate-distortion rounding (0: none); ``sensitivity``: matrices and rows
    whose errors cost more get finer steps, ``super_weights``: those that hold one stay at 8 bits,
    both of which take a look at the model at work. Of rtn: ``bits`` (4), ``symmetric`` (no, but
    with training), and ``group`` (64): columns that share a scale, or what is next below that
    divides a matrix, or "row". Of nf4: ``double_quant``, its scales quantized too. Options of
    another method are errors.
    """

    method: Literal["ecsq", "rtn", "nf4", "int8"] = "ecsq"
    bits_per_weight: float | None = Field(default=None, gt=0, le=9)
    max_perplexity_ratio: float | None = Field(default=None, gt=1)
    rdo: float | None = Field(default=None, ge=0)
    sensitivity: bool | None = None
    super_weights: bool | None = None
    bits: int | None = Field(default=None, ge=2, le=8)
    group: Annotated[int, Field(ge=1)] | Literal["row"] | None = None
    symmetric: bool | None = None
    double_quant: bool | None = None

    @model_validator(mode="after")
    def _of_the_method(self) -> WeightsConfig:
        given = set(self.model_dump(exclude_none=True)) - {"method"}
        if strange := given - _OF[self.method]:
            raise ValueError(f"{self.method} knows no {', '.join(sorted(strange))}")
        if self.method == "ecsq" and (self.bits_per_weight is None) == (
            self.max_perplexity_ratio is None
        ):
            raise ValueError("ecsq needs either bits_per_weight or max_perplexity_ratio")
        return self

    @property
    def columns(self) -> int | None:
        """The columns that share a scale, None for all of a row."""
        return None if self.group == "row" else self.group or 64


class ActivationsConfig(StageConfig):
    """Inputs of quantized layers rounded while the model runs, each token by its largest value.

    ``fold``: alpha, 0 to 1, of the scales that are moved from the inputs' columns into the weights
    (`compress.quant.plan_fold`); null: none are.
    """

    bits: Literal[8] = 8
    fold: float | None = Field(default=None, ge=0, le=1)


class TrainingConfig(StageConfig):
    """EdgeQAT; see `compress.quant.qat.QatSettings` for what is not said here.

    ``mode``: "blockwise" trains windows of at most ``window`` blocks, one after the other, cut
    where the activations' entropy is low or, with "uniform" ``windows``, evenly; "full" trains the
    whole model at once. ``step_rate``: None for 1e-3 with rtn and for 0 with ecsq, whose steps the
    rate has chosen.
    """

    mode: Literal["blockwise", "full"] = "blockwise"
    windows: Literal["entropy", "uniform"] = "uniform"
    window: int = Field(default=4, ge=1)
    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    step_rate: float | None = Field(default=None, ge=0)
    scale: Literal["lsq", "statsq"] = "lsq"
    per_tensor: bool = False
    attention: float = Field(default=1.0, ge=0)
    entropy: float = Field(default=0.1, ge=0)
    rate: float = Field(default=0.0, ge=0)
    soft: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=2.0, gt=0)
    paper_literal: bool = False
    anneal: float = Field(default=0.1, ge=0, le=1)
    anneal_range: float = Field(default=0.005, gt=0, le=0.5)
    every: int = Field(default=20, ge=1)

    def settings(self, method: str, scale_dtype: torch.dtype, seed: int) -> QatSettings:
        """Those of a training that begins with the steps of ``method``."""
        from compress.quant import QatSettings

        stored = cast("ScaleDtype", str(scale_dtype).removeprefix("torch."))

        given = self.model_dump(exclude={"mode", "windows", "window"})
        if self.step_rate is None:
            given["step_rate"] = 0.0 if method == "ecsq" else 1e-3
        return QatSettings(**given, scale_dtype=stored, seed=seed)


class SearchConfig(StageConfig):
    """A step for the attention and the MLP of each block, found by evolution.

    See `compress.quant.LevelSearch`. ``drop``: whether some may be left out altogether.
    """

    generations: int = Field(default=10, ge=0)
    offspring: int = Field(default=8, ge=1)
    survivors: tuple[int, ...] = (2, 1)
    tokens: tuple[int, ...] = (256, 1024)
    mutations: int = Field(default=3, ge=1)
    step: float = Field(default=0.25, gt=0)
    drop: bool = True

    def settings(self, seed: int) -> LevelSearch:
        """Raises `BadInput` for stages that make no selection."""
        return LevelSearch(**self.model_dump(exclude={"drop"}), seed=seed)


class QuantizeConfig(StageConfig):
    """``ignore``: patterns (``*`` and ``?``) of names of layers that stay as they are."""

    weights: WeightsConfig
    activations: ActivationsConfig | None = None
    search: SearchConfig | None = None
    training: TrainingConfig | None = None
    ignore: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _together(self) -> QuantizeConfig:
        weights = self.weights
        if weights.method in BNB and (self.activations or self.training or self.search):
            raise ValueError(f"{weights.method} takes no activations, search or training")
        if self.search and weights.bits_per_weight is None:
            raise ValueError("search needs weights.bits_per_weight, its budget")
        if self.training and weights.method == "rtn" and weights.symmetric is False:
            raise ValueError("training needs symmetric weights")
        return self

    @property
    def symmetric(self) -> bool:
        """Whether codes have no zero points; unless said otherwise trained ones have none."""
        stated = self.weights.symmetric
        return self.training is not None if stated is None else stated

    @property
    def calibrated(self) -> bool:
        """Whether the model is looked at while it works."""
        weights = self.weights
        folded = self.activations is not None and self.activations.fold is not None
        asked = weights.super_weights or weights.sensitivity or weights.max_perplexity_ratio
        return bool(asked or folded or self.search or self.training)
