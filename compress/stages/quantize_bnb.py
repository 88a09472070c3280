"""`quantize` by bitsandbytes: NF4 and LLM.int8, as transformers would while it loads a model."""

from __future__ import annotations

from typing import cast

from compress.checkpoint import Checkpoint, TensorInfo
from compress.quant import BnbKind, bnb_rate, bnb_unfit, export_bnb, layer_name, prove_bnb
from compress.stages.base import (
    CheckpointView,
    Estimate,
    StageReport,
    Workspace,
    total_nbytes,
)
from compress.stages.quantize_options import BNB, QuantizeConfig


def unfit(config: QuantizeConfig, info: TensorInfo) -> str | None:
    """Why bitsandbytes cannot quantize a weight; None if it can, or is not asked to."""
    return bnb_unfit(info, _kind(config)) if config.weights.method in BNB else None


def plan_bnb(
    checkpoint: CheckpointView, config: QuantizeConfig, names: list[str], skipped: dict[str, str]
) -> Estimate:
    """The size as bitsandbytes stores it."""
    infos = checkpoint.tensor_infos()
    rate = bnb_rate(names, infos, _kind(config), bool(config.weights.double_quant))
    saved = sum(infos[name].nbytes for name in names) - (rate.codes + rate.scales) // 8
    changes = [f"{len(names)} weights of linear layers quantized by bitsandbytes, {_how(config)}"]
    changes += [f"{len(skipped)} stay, as the report says"] if skipped else []
    return Estimate(total_nbytes(checkpoint) - saved, changes)


def run_bnb(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    names: list[str],
    skipped: dict[str, str],
    workspace: Workspace,
) -> tuple[Checkpoint, StageReport]:
    """Write it tensor by tensor, and prove it to be what transformers makes of the original."""
    kind, double = _kind(config), bool(config.weights.double_quant)
    done, origins = export_bnb(
        checkpoint,
        names,
        kind,
        workspace.directory,
        skipped=skipped,
        double_quant=double,
        progress=workspace.progress,
    )
    prove_bnb(checkpoint, done, names, kind)
    infos = checkpoint.tensor_infos()
    rate = bnb_rate(names, infos, kind, double)
    rates = {name: bnb_rate([name], infos, kind, double) for name in names}
    bits = round(rate.bits_per_weight, 4)
    return done, StageReport(
        stage="quantize",
        config=config.model_dump(mode="json"),
        summary=f"{len(names)} weights quantized by bitsandbytes, {_how(config)}, "
        f"{len(skipped)} skipped; {bits} bits per weight as stored, scales included",
        metrics={
            "format": "bitsandbytes",
            "bits_per_weight": bits,
            "weights": rate.weights,
            "code_bits": rate.codes,
            "scale_bits": rate.scales,
            "zero_point_bits": 0,
            "layers": {
                layer_name(name): {"bits_per_weight": round(found.bits_per_weight, 4)}
                for name, found in rates.items()
            },
            "skipped": {layer_name(name): reason for name, reason in skipped.items()},
            "bytes_in": total_nbytes(checkpoint),
            "bytes_out": total_nbytes(done),
        },
        renamed={new: old for new, old in origins.items() if new != old},
        changed=sorted(origins),
    )


def _kind(config: QuantizeConfig) -> BnbKind:
    return cast("BnbKind", config.weights.method)


def _how(config: QuantizeConfig) -> str:
    return config.weights.method + (
        " with double quantization" if config.weights.double_quant else ""
    )
