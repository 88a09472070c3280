"""`quantize`: the weights of linear layers as integers, in a checkpoint that engines read."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import ClassVar

from compress.checkpoint import Checkpoint, dense_config
from compress.errors import BadInput
from compress.prune import model_config
from compress.quant import (
    ELSEWHERE,
    SCHEME,
    QTensor,
    Rate,
    Scheme,
    export_quantized,
    fitting_group,
    layer_name,
    linear_names,
    prove_export,
    sqnr,
)
from compress.signals import check_length, load_text
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
from compress.stages.quantize_bnb import plan_bnb, run_bnb, unfit
from compress.stages.quantize_options import BNB, QuantizeConfig
from compress.stages.quantizing import quantizing


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
        names, skipped = _chosen(checkpoint, config)
        if config.weights.method in BNB:
            return plan_bnb(checkpoint, config, names, skipped)
        schemes = _schemes(checkpoint, config, names)
        if config.search:
            config.search.settings(calibration.seed)
        if config.calibrated:
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
        names, skipped = _chosen(checkpoint, config)
        if config.weights.method in BNB:
            return run_bnb(checkpoint, config, names, skipped, workspace)
        schemes = _schemes(checkpoint, config, names)
        made = quantizing(checkpoint, config, schemes, workspace)
        rates: dict[str, Rate] = {}
        noise: dict[str, float | None] = {}

        def noted(name: str) -> QTensor:
            q = made.quantized(name)
            gone = math.isinf(made.c.get(name, 0.0))  # nothing but zeros, which cost nothing
            rates[name] = Rate(q.codes.numel()) if gone else q.rate()
            ratio = sqnr(made.read(name), q)
            noise[name] = round(ratio, 3) if math.isfinite(ratio) else None
            return q

        activations = config.activations.bits if config.activations else None
        done, origins = export_quantized(
            checkpoint,
            schemes,
            noted,
            workspace.directory,
            activations=activations,
            skipped=skipped,
            replaced=made.replaced,
            config=made.config,
            progress=workspace.progress,
        )
        for name in schemes.keys() - rates.keys():  # written before an interruption
            noted(name)
        prove_export(
            checkpoint,
            done,
            schemes,
            made.quantized,
            activations=activations,
            replaced=made.replaced,
        )
        total = sum((rates[name] for name in schemes), Rate())
        bits = round(total.bits_per_weight, 4)
        return done, StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=f"{len(schemes)} weights quantized by {_how(config)}, {len(skipped)} skipped; "
            f"{bits} bits per weight once coded, scales included",
            metrics={
                "format": "compressed-tensors",
                "bits_per_weight": bits,
                "weights": total.weights,
                "code_bits": total.codes,
                "scale_bits": total.scales,
                "zero_point_bits": total.zeros,
                "layers": {
                    layer_name(name): {
                        "bits_per_weight": round(rates[name].bits_per_weight, 4),
                        "sqnr_db": noise[name],
                        **_step(made.c.get(name)),
                    }
                    for name in schemes
                },
                **made.metrics,
                "skipped": {layer_name(name): reason for name, reason in skipped.items()},
                "bytes_in": total_nbytes(checkpoint),
                "bytes_out": total_nbytes(done),
            },
            renamed={new: old for new, old in origins.items() if new != old},
            changed=sorted({*origins, *made.replaced}),
        )


def _step(c: float | None) -> dict[str, float]:
    """``c``, of a weight that has one."""
    return {} if c is None or math.isinf(c) else {"c": round(c, 5)}


def _how(config: QuantizeConfig) -> str:
    weights = config.weights
    if weights.method == "ecsq":
        goal = f"{weights.bits_per_weight:g} bits per weight" if weights.bits_per_weight else ""
        how = f"ecsq at {goal or f'a perplexity ratio of {weights.max_perplexity_ratio:g}'}"
    else:
        by = f"groups of {weights.columns}" if weights.columns else "row"
        kind = "symmetric" if config.symmetric else "asymmetric"
        how = f"{weights.bits or 4}-bit {kind} rtn by {by}"
    if config.training:
        how += f", trained {'whole' if config.training.mode == 'full' else 'by windows of blocks'}"
    return how + (", activations 8 bits by token" if config.activations else "")


def _chosen(checkpoint: CheckpointView, config: QuantizeConfig) -> tuple[list[str], dict[str, str]]:
    """The weights that are quantized, and why the others are not."""
    stated = dense_config(checkpoint.config).get("quantization_config")
    if stated:
        method = stated.get("quant_method") if isinstance(stated, dict) else stated
        raise BadInput(f"already quantized by {method}", where=checkpoint.path)
    linears = linear_names(checkpoint)
    infos = checkpoint.tensor_infos()
    names, skipped = [], dict(linears.skipped)
    for name in linears.weights:
        if any(fnmatchcase(layer_name(name), pattern) for pattern in config.ignore):
            skipped[name] = "ignored by the recipe"
        elif reason := unfit(config, infos[name]):
            skipped[name] = reason
        else:
            names.append(name)
    renamed = [name for name, reason in skipped.items() if reason == ELSEWHERE]
    if len(renamed) > len(names):
        raise BadInput(
            "cannot be quantized: transformers loads its weights under other names",
            where=checkpoint.path,
            got=f"{len(renamed)} of {len(renamed) + len(names)}, as {layer_name(renamed[0])}",
        )
    if not names:
        raise BadInput(
            "has no weight to quantize",
            where=checkpoint.path,
            got="; ".join(f"{layer_name(n)}: {why}" for n, why in list(skipped.items())[:2])
            or "no linear layer",
        )
    return names, skipped


def _schemes(
    checkpoint: CheckpointView, config: QuantizeConfig, names: list[str]
) -> dict[str, Scheme]:
    infos = checkpoint.tensor_infos()
    return {name: _scheme(config, infos[name].shape[1]) for name in names}


def _scheme(config: QuantizeConfig, columns: int) -> Scheme:
    weights = config.weights
    if weights.method == "ecsq":
        return SCHEME
    group = weights.columns and fitting_group(columns, weights.columns)
    return Scheme(weights.bits or 4, group, config.symmetric)
