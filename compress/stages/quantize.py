"""`quantize`: the weights of linear layers as integers, in a checkpoint that engines read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from compress.checkpoint import FLOATS, Checkpoint, dense_config
from compress.errors import BadInput
from compress.prune import model_config
from compress.quant import (
    SCHEME,
    Allocation,
    QTensor,
    Rate,
    Scheme,
    export_quantized,
    fit_rate,
    fitting_group,
    layer_name,
    linear_names,
    measure_moments,
    prove_export,
    quantize_ecsq,
    quantize_rtn,
    sqnr,
    super_weights,
)
from compress.signals import check_length, load_float32, load_text, windows
from compress.stages.base import (
    Calibration,
    CheckpointView,
    Estimate,
    StageConfig,
    StageReport,
    Workspace,
    register,
    total_nbytes,
)

if TYPE_CHECKING:
    import torch

_OF_RTN = {"bits", "group", "symmetric"}
_OF_ECSQ = {"bits_per_weight", "rdo", "sensitivity", "super_weights"}


class WeightsConfig(StageConfig):
    """``method``: "ecsq", whose steps are as wide as ``bits_per_weight`` of all quantized matrices
    together asks, or "rtn", of a fixed width.

    Of ecsq: ``rdo``, the lambda of rate-distortion rounding (0: none); ``sensitivity``: matrices
    whose inputs are large get finer steps, ``super_weights``: those that hold one stay at 8 bits,
    both of which take a look at the model at work. Of rtn: ``bits`` (4),
    ``symmetric`` (no), and ``group`` (64): columns that share a scale, or what is next below that
    divides a matrix, or "row". Options of the other method are errors.
    """

    method: Literal["ecsq", "rtn"] = "ecsq"
    bits_per_weight: float | None = Field(default=None, gt=0, le=9)
    rdo: float | None = Field(default=None, ge=0)
    sensitivity: bool | None = None
    super_weights: bool | None = None
    bits: int | None = Field(default=None, ge=2, le=8)
    group: Annotated[int, Field(ge=1)] | Literal["row"] | None = None
    symmetric: bool | None = None

    @model_validator(mode="after")
    def _of_the_method(self) -> WeightsConfig:
        given = set(self.model_dump(exclude_none=True))
        if strange := given & (_OF_RTN if self.method == "ecsq" else _OF_ECSQ):
            raise ValueError(f"{self.method} knows no {', '.join(sorted(strange))}")
        if self.method == "ecsq" and self.bits_per_weight is None:
            raise ValueError("ecsq needs bits_per_weight")
        return self

    @property
    def columns(self) -> int | None:
        """The columns that share a scale, None for all of a row."""
        return None if self.group == "row" else self.group or 64


class ActivationsConfig(StageConfig):
    """Inputs of quantized layers rounded while the model runs, each token by its largest value."""

    bits: Literal[8] = 8


class QuantizeConfig(StageConfig):
    """``ignore``: patterns (``*`` and ``?``) of names of layers that stay as they are."""

    weights: WeightsConfig
    activations: ActivationsConfig | None = None
    ignore: tuple[str, ...] = ()


@register
class Quantize:
    """Quantize every linear layer that can be, name the others, prove what loads.

    The outcome is a compressed-tensors checkpoint: transformers and engines load it without us.
    """

    name: ClassVar[str] = "quantize"
    Config: ClassVar[type[StageConfig]] = QuantizeConfig
    lossless: ClassVar[bool] = False

    def plan(
        self,
        checkpoint: CheckpointView,
        config: QuantizeConfig,
        calibration: Calibration,
        exact: bool = True,
    ) -> Estimate:
        """The size with codes as wide as they are stored before `encode_weights`.

        Raises `BadInput` where nothing can be quantized, the model already is, or a calibration
        text that is needed is not there.
        """
        schemes, skipped = _schemes(checkpoint, config)
        if config.weights.super_weights or config.weights.sensitivity:
            check_length(model_config(checkpoint.config), calibration.length)
            load_text(calibration.data)
        infos = checkpoint.tensor_infos()
        saved = 0
        for name, scheme in schemes.items():
            rows, columns = infos[name].shape
            width = infos[name].nbytes // (rows * columns)
            packed = scheme.symmetric and config.activations is None
            bits = scheme.bits if packed else 8
            groups = columns // (scheme.group or columns)
            side = rows * groups * (width + (not scheme.symmetric))
            saved += infos[name].nbytes - rows * columns * bits // 8 - side
        changes = [f"{len(schemes)} weights of linear layers as integers, by {_how(config)}"]
        changes += [f"{len(skipped)} stay, as the report says"] if skipped else []
        return Estimate(total_nbytes(checkpoint) - saved, changes)

    def run(
        self, checkpoint: Checkpoint, config: QuantizeConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Write the quantized checkpoint and prove it to load as the model its codes stand for."""
        schemes, skipped = _schemes(checkpoint, config)
        quantized, allocation = _quantizer(checkpoint, config, schemes, workspace)
        rates: dict[str, Rate] = {}
        noise: dict[str, float] = {}

        def noted(name: str) -> QTensor:
            q = quantized(name)
            rates[name] = q.rate()
            noise[name] = round(sqnr(checkpoint.read(name), q), 3)
            return q

        activations = config.activations.bits if config.activations else None
        done, origins = export_quantized(
            checkpoint,
            schemes,
            noted,
            workspace.directory,
            activations=activations,
            skipped=skipped,
            progress=workspace.progress,
        )
        for name in schemes.keys() - rates.keys():  # written before an interruption
            noted(name)
        prove_export(checkpoint, done, schemes, quantized, activations=activations)
        total = sum((rates[name] for name in schemes), Rate())
        bits = round(total.bits_per_weight, 4)
        return done, StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=f"{len(schemes)} weights quantized by {_how(config)}, {len(skipped)} skipped; "
            f"{bits} bits per weight once coded, scales included",
            metrics={
                "bits_per_weight": bits,
                "weights": total.weights,
                "code_bits": total.codes,
                "scale_bits": total.scales,
                "zero_point_bits": total.zeros,
                "layers": {
                    layer_name(name): {
                        "bits_per_weight": round(rates[name].bits_per_weight, 4),
                        "sqnr_db": noise[name],
                        **({"c": round(allocation.c[name], 5)} if allocation else {}),
                    }
                    for name in schemes
                },
                "skipped": {layer_name(name): reason for name, reason in skipped.items()},
                "bytes_in": total_nbytes(checkpoint),
                "bytes_out": total_nbytes(done),
            },
            renamed={new: old for new, old in origins.items() if new != old},
            changed=sorted(origins),
        )


def _how(config: QuantizeConfig) -> str:
    weights = config.weights
    if weights.method == "ecsq":
        how = f"ecsq at {weights.bits_per_weight:g} bits per weight"
    else:
        by = f"groups of {weights.columns}" if weights.columns else "row"
        kind = "symmetric" if weights.symmetric else "asymmetric"
        how = f"{weights.bits or 4}-bit {kind} rtn by {by}"
    return how + (", activations 8 bits by token" if config.activations else "")


def _schemes(
    checkpoint: CheckpointView, config: QuantizeConfig
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """The scheme of each weight that is quantized, and why the others are not."""
    stated = dense_config(checkpoint.config).get("quantization_config")
    if stated:
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        raise BadInput(f"already quantized by {method}", where=checkpoint.path)
    linears = linear_names(checkpoint)
    infos = checkpoint.tensor_infos()
    schemes, skipped = {}, dict(linears.skipped)
    for name in linears.weights:
        if any(fnmatchcase(layer_name(name), pattern) for pattern in config.ignore):
            skipped[name] = "ignored by the recipe"
        else:
            schemes[name] = _scheme(config.weights, infos[name].shape[1])
    if not schemes:
        raise BadInput(
            "has no weight to quantize",
            where=checkpoint.path,
            got="; ".join(f"{layer_name(n)}: {why}" for n, why in list(skipped.items())[:2])
            or "no linear layer",
        )
    return schemes, skipped


def _scheme(weights: WeightsConfig, columns: int) -> Scheme:
    if weights.method == "ecsq":
        return SCHEME
    group = weights.columns and fitting_group(columns, weights.columns)
    return Scheme(weights.bits or 4, group, bool(weights.symmetric))


def _quantizer(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    schemes: Mapping[str, Scheme],
    workspace: Workspace,
) -> tuple[Callable[[str], QTensor], Allocation | None]:
    """What quantizes a weight by name, and for ecsq how the bits were shared out."""
    import torch

    infos, weights = checkpoint.tensor_infos(), config.weights
    dtypes = {name: getattr(torch, FLOATS[infos[name].dtype]) for name in schemes}
    if weights.method == "rtn":
        return (
            lambda name: quantize_rtn(
                checkpoint.read(name), schemes[name], dtypes[name], name=name
            ),
            None,
        )
    text = workspace.calibration
    fine: list[str] = []
    sensitivities = None
    if weights.super_weights or weights.sensitivity:
        tokens = windows(text.data, checkpoint.tokenizer(), text.sequences, text.length, text.seed)
        model = load_float32(checkpoint)
        if weights.super_weights:
            fine = [name for name in super_weights(model, tokens[:1]) if name in schemes]
        if weights.sensitivity:
            moments = measure_moments(
                model, tokens, layers=list(schemes), progress=workspace.progress
            )
            sensitivities = {name: found.sensitivity for name, found in moments.items()}
    allocation = fit_rate(
        checkpoint.read,
        list(schemes),
        weights.bits_per_weight or 0.0,
        _one(set(dtypes.values()), checkpoint),
        sensitivities=sensitivities,
        fine=fine,
        rdo=weights.rdo or 0.0,
        seed=text.seed,
        progress=workspace.progress,
    )
    return partial(_ecsq, checkpoint, allocation, dtypes, weights.rdo or 0.0), allocation


def _ecsq(
    checkpoint: Checkpoint,
    allocation: Allocation,
    dtypes: Mapping[str, torch.dtype],
    rdo: float,
    name: str,
) -> QTensor:
    return quantize_ecsq(
        checkpoint.read(name), allocation.c[name], dtypes[name], rdo=rdo, name=name
    )


def _one(dtypes: set[torch.dtype], checkpoint: Checkpoint) -> torch.dtype:
    if len(dtypes) > 1:
        raise BadInput(
            "its linear layers are of several dtypes",
            where=checkpoint.path,
            got=", ".join(sorted(str(dtype) for dtype in dtypes)),
            mend="set model.dtype in the recipe",
        )
    [dtype] = dtypes
    return dtype
