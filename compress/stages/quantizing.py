"""From the options of `quantize` to what quantizes each weight of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.checkpoint import FLOATS, Checkpoint
from compress.errors import BadInput
from compress.prune import Unit, block_count, find_stack, find_units, skip_config
from compress.quant import (
    Fold,
    Levels,
    QTensor,
    Scheme,
    fit_rate,
    layer_name,
    measure_fisher,
    measure_moments,
    plan_fold,
    quantize_ecsq,
    quantize_rtn,
    rate_for_perplexity,
    row_steps,
    search_levels,
    super_weights,
)
from compress.signals import load_float32, significant, windows
from compress.stages.base import Workspace
from compress.stages.quantize_options import QuantizeConfig, SearchConfig, TrainingConfig

if TYPE_CHECKING:
    import torch

    from compress.quant import Trained

Quantizer = Callable[[str], QTensor]


@dataclass
class Quantizing:
    """``read``: a weight as it is to be quantized; ``quantized``: what it becomes, the same
    whenever asked; ``replaced``: new values of other tensors; ``c``: ecsq's, infinite for weights
    that are left out; all of these by name. ``config``: the model's, where it says more than
    before. ``metrics``: what is to be reported."""

    read: Callable[[str], torch.Tensor]
    quantized: Quantizer
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    c: Mapping[str, float] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


class _Work:
    """The model at work, if anything asks for it, and what has been found out so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: QuantizeConfig,
        schemes: Mapping[str, Scheme],
        workspace: Workspace,
    ) -> None:
        import torch

        self.checkpoint, self.config, self.workspace = checkpoint, config, workspace
        self.schemes, self.infos = schemes, checkpoint.tensor_infos()
        self.dtypes = {name: getattr(torch, FLOATS[self.infos[name].dtype]) for name in schemes}
        self.model: Any = None
        self.tokens: Any = None
        self.unseen: Any = None
        self.fold = Fold()
        self.units: dict[Unit, list[str]] = {}
        self.done = Quantizing(self.read, self._rtn)
        if config.calibrated:
            text = workspace.calibration
            judging = (text.sequences // 2 or 1) if config.search else 0
            rows = windows(
                text.data, checkpoint.tokenizer(), text.sequences + judging, text.length, text.seed
            )
            self.tokens, self.unseen = rows[: text.sequences], rows[text.sequences :]
            self.model = load_float32(checkpoint)

    @property
    def common(self) -> dict[str, Any]:
        """What calibrated functions are told beside the rest."""
        return {"subject": self.checkpoint.fingerprint, "progress": self.workspace.progress}

    @property
    def activations(self) -> int | None:
        """The bits of the layers' inputs."""
        return self.config.activations.bits if self.config.activations else None

    def journal(self, name: str) -> Any:
        """Where a function keeps what a resumed run need not do again."""
        return self.workspace.scratch and self.workspace.scratch / name

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is to be quantized."""
        return self.fold.apply(name, self.checkpoint.read(name))

    def dtype(self) -> torch.dtype:
        """The one dtype of all that is quantized."""
        dtypes = sorted({str(dtype) for dtype in self.dtypes.values()})
        if len(dtypes) > 1:
            raise BadInput(
                "its linear layers are of several dtypes",
                where=self.checkpoint.path,
                got=", ".join(dtypes),
                mend="set model.dtype in the recipe",
            )
        return next(iter(self.dtypes.values()))

    def _rtn(self, name: str) -> QTensor:
        return quantize_rtn(self.read(name), self.schemes[name], self.dtypes[name], name=name)


def quantizing(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    schemes: Mapping[str, Scheme],
    workspace: Workspace,
) -> Quantizing:
    """Calibrate, fold, share the bits out and train, as far as the options ask for it.

    Raises `BadInput` for what the model or the text do not allow.
    """
    work = _Work(checkpoint, config, schemes, workspace)
    if config.activations and config.activations.fold is not None:
        _fold(work, config.activations.fold)
    if config.weights.method == "ecsq":
        _share_bits(work)
    if config.training:
        _train(work, config.training)
    work.model = None  # the quantizer holds on to the rest of the work
    return work.done


def _fold(work: _Work, alpha: float) -> None:
    """Fold, in the model as well."""
    moments = measure_moments(work.model, work.tokens, progress=work.workspace.progress)
    wanted = {name: found for name, found in moments.items() if name in work.schemes}
    fold = plan_fold(work.model, wanted, work.infos, alpha=alpha)
    work.fold = fold
    changed = {*fold.vectors, *fold.columns, *fold.rows}
    for name in changed:
        work.model.get_parameter(name).data.copy_(work.read(name))
    work.done.replaced = {name: work.read(name) for name in sorted(changed - work.schemes.keys())}
    work.done.metrics["fold"] = {
        "alpha": alpha,
        "layers": len(fold.columns.keys() & work.schemes.keys()),
        "skipped": {
            layer_name(name): reason
            for name, reason in fold.skipped.items()
            if name in work.schemes
        },
    }


def _share_bits(work: _Work) -> None:
    """Ecsq's steps."""
    weights, seed = work.config.weights, work.workspace.calibration.seed
    names, dtype, rdo = list(work.schemes), work.dtype(), weights.rdo or 0.0
    fine: list[str] = []
    if weights.super_weights:
        fine = [name for name in super_weights(work.model, work.tokens[:1]) if name in names]
    shares: dict[str, Any] = {"fine": fine}
    rows: dict[str, torch.Tensor] = {}
    if weights.sensitivity:
        fisher = measure_fisher(
            work.model, work.tokens, names, seed=seed, progress=work.workspace.progress
        )
        shares["sensitivities"] = {name: float(found.mean()) for name, found in fisher.items()}
        rows = {name: row_steps(work.read(name), found, name) for name, found in fisher.items()}
        shares["rows"] = rows
    if work.config.search:
        levels = _searched(work, work.config.search, shares)
        gone = [name for unit in levels.dropped for name in work.units[unit]]
        shares |= {"sensitivities": None, "factors": levels.factors, "dropped": gone}
    if weights.max_perplexity_ratio:
        found = rate_for_perplexity(
            work.model,
            work.read,
            names,
            weights.max_perplexity_ratio,
            work.tokens,
            dtype,
            **shares,
            rdo=rdo,
            seed=seed,
            activations=work.activations,
            journal=work.journal("perplexity.json"),
            **work.common,
        )
        allocation = found.allocation
        work.done.metrics["perplexity_search"] = {
            "max_ratio": weights.max_perplexity_ratio,
            "ratio": significant(found.ratio),
            "trials": [
                {
                    "bits_per_weight": significant(trial.bits_per_weight),
                    "ratio": significant(trial.ratio) if math.isfinite(trial.ratio) else None,
                }
                for trial in found.trials
            ],
        }
    else:
        allocation = fit_rate(
            work.read,
            names,
            weights.bits_per_weight or 0.0,
            dtype,
            **shares,
            rdo=rdo,
            seed=seed,
            progress=work.workspace.progress,
        )
    read, c = work.read, allocation.c

    def quantized(name: str) -> QTensor:
        w = read(name)
        if math.isinf(c[name]):
            return quantize_ecsq(w.new_zeros(w.shape), 0.0, dtype, name=name)
        return quantize_ecsq(w, c[name], dtype, rdo=rdo, rows=rows.get(name), name=name)

    work.done.quantized, work.done.c = quantized, c


def _searched(work: _Work, config: SearchConfig, shares: Mapping[str, Any]) -> Levels:
    """Levels for attention and MLPs; what else is quantized has the common step."""
    found = find_units(work.model, "joint")
    sublayers = {
        (kind, index): getattr(block, kind)
        for index, block in enumerate(found.sublayers)
        for kind in found.kinds
    }
    work.units = {
        unit: [name for name in work.schemes if _inside(name, sublayer.modules)]
        for unit, sublayer in sublayers.items()
    }
    work.units = {unit: names for unit, names in work.units.items() if names}
    # Zeros are an absence where all that writes into the residual becomes zero.
    whole = {unit for unit, own in sublayers.items() if work.schemes.keys() >= set(own.outputs)}
    droppable = [unit for unit in found.free() if unit in whole] if config.drop else []
    grouped = {name for names in work.units.values() for name in names}
    levels = search_levels(
        work.model,
        work.read,
        work.units,
        [name for name in work.schemes if name not in grouped],
        work.config.weights.bits_per_weight or 0.0,
        work.tokens,
        config.settings(work.workspace.calibration.seed),
        scale_dtype=work.dtype(),
        droppable=droppable,
        unseen=work.unseen,
        journal=work.journal("levels.json"),
        **shares,
        **work.common,
    )
    work.done.metrics["search"] = {
        "start_loss": significant(levels.start_loss),
        "loss": significant(levels.loss),
        "history": [significant(loss) for loss in levels.history],
        "unseen": [significant(loss) for loss in levels.unseen or ()],
        "kept": levels.kept,
        "dropped": [list(unit) for unit in levels.dropped],
        "units": {
            kind: [levels.offsets.get((kind, index)) for index in range(found.blocks)]
            for kind in found.kinds
        },
    }
    dropped = {kind: [i for k, i in levels.dropped if k == kind] for kind in found.kinds}
    if levels.dropped:
        work.done.config = skip_config(work.checkpoint.config, **dropped)
    return levels


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _train(work: _Work, config: TrainingConfig) -> None:
    """The weights of the blocks, or with "full" all, trained from what they are quantized to."""
    from compress.quant import train_full

    before, seed = work.done.quantized, work.workspace.calibration.seed
    settings = config.settings(work.config.weights.method, work.dtype(), seed)
    stack = find_stack(work.infos, block_count(work.checkpoint.config))
    targets = {
        name: scheme
        for name, scheme in work.schemes.items()
        if config.mode == "full" or stack.block(name) is not None
    }
    start = {name: before(name) for name in targets} if config.scale == "lsq" else {}
    options: dict[str, Any] = {
        "activations": work.activations,
        "start": start,
        **work.common,
    }
    metrics: dict[str, Any] = {"mode": config.mode, "paper_literal": config.paper_literal}
    if config.mode == "full":
        trained = train_full(
            work.model,
            work.tokens,
            targets,
            settings,
            journal=work.journal("qat.safetensors"),
            **options,
        )
    else:
        trained = _by_windows(work, config, targets, settings, options, metrics)
    metrics |= {
        "history": [round(loss, 6) for loss in trained.history],
        "errors": [round(error, 6) for error in trained.errors],
        "oscillation": round(sum(trained.oscillation.values()) / len(targets), 6),
    }
    work.done.metrics["training"] = metrics
    weights = trained.weights
    work.done.quantized = lambda name: weights[name] if name in weights else before(name)


def _by_windows(
    work: _Work,
    config: TrainingConfig,
    targets: Mapping[str, Scheme],
    settings: Any,
    options: Mapping[str, Any],
    metrics: dict[str, Any],
) -> Trained:
    from compress.quant import (
        block_entropies,
        entropy_windows,
        train_blockwise,
        uniform_windows,
    )

    count = block_count(work.checkpoint.config)
    if config.windows == "entropy":
        entropies = block_entropies(work.model, work.tokens, progress=work.workspace.progress)
        metrics["entropies"] = [round(entropy, 6) for entropy in entropies]
        cut = entropy_windows(entropies, config.window)
    else:
        cut = uniform_windows(count, config.window)
    metrics |= {"partition": config.windows, "windows": [[w.start, w.stop] for w in cut]}
    stack = find_stack(work.infos, count)
    used = {stack.block(name) for name in targets}
    return train_blockwise(
        work.model,
        work.tokens,
        targets,
        settings,
        [window for window in cut if used & set(window)],
        journal=work.journal("qat"),
        **options,
    )
