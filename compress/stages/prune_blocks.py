"""`prune_blocks`: whole blocks, or attention or MLP of some, removed: those that add least."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from compress.checkpoint import TOKENS, Checkpoint, dense_config
from compress.errors import BadInput
from compress.progress import Progress
from compress.prune import (
    KINDS,
    Budget,
    Healed,
    Removal,
    Selection,
    Unhealable,
    Unit,
    Units,
    apply_heal,
    block_count,
    check_drop,
    check_pruned,
    check_rules,
    cut_config,
    drop_sublayers,
    find_stack,
    find_units,
    gone_before,
    heal,
    model_config,
    output_without,
    remove_blocks,
    savings,
    select,
    skip_config,
    stale_patterns,
    unit_tensors,
)
from compress.signals import (
    SCORERS,
    check_length,
    load_float32,
    load_text,
    protected_blocks,
    summarize,
    windows,
)
from compress.stages.base import (
    Calibration,
    CheckpointView,
    Decoded,
    Estimate,
    StageConfig,
    StageReport,
    Workspace,
    register,
    total_nbytes,
)
from compress.stages.prune_options import PruneBlocksConfig


@register
class PruneBlocks:
    """Measure in one calibration pass, choose, remove, and prove the outcome.

    Whole blocks leave a smaller checkpoint of the same kind. Of a block's parts the weights become
    zeros, which every loader computes rightly and which code to nothing, and ``per_layer_config``
    names them, so that `compress.skip_sublayers` can leave them out and run faster.
    """

    name: ClassVar[str] = "prune_blocks"
    Config: ClassVar[type[StageConfig]] = PruneBlocksConfig
    lossless: ClassVar[bool] = False

    def plan(
        self,
        checkpoint: CheckpointView,
        config: PruneBlocksConfig,
        calibration: Calibration,
        exact: bool = True,
    ) -> Estimate:
        """The size without the smallest blocks that may go, exact where all are equal; parts stay.

        Raises `BadInput` where so much cannot go, the model or its config is not one to prune, or
        the calibration text is not there.
        """
        _check_order(checkpoint)
        kinds = KINDS[config.granularity]
        check_rules(config.scorer, config.search, kinds)
        config.evolution.settings(calibration.seed)
        blocks = block_count(checkpoint.config)
        gone_before(model_config(checkpoint.config))
        check_drop(blocks, config.drop or 1, config.protect, len(kinds))
        check_length(model_config(checkpoint.config), calibration.length)
        load_text(calibration.data)
        size = total_nbytes(checkpoint) - _least_saved(checkpoint, config, blocks)
        chosen = config.scorer if config.search == "one_shot" else f"{config.search} search"
        what = "blocks" if config.granularity == "block" else f"sublayers ({config.granularity})"
        removed = f"{config.drop} of {blocks * len(kinds)} {what}"
        if config.budget:
            measure, share = config.budget.stated
            if measure == "parameters" and config.granularity == "block":
                size = round(total_nbytes(checkpoint) * (1 - share))
            removed = f"{what} with {share:.3g} of the {measure.replace('_', ' ')}"
        outcome = Decoded(checkpoint) if checkpoint.coded else None
        return Estimate(size, [f"{removed} removed, chosen by {chosen}"], outcome)

    def run(
        self, checkpoint: Checkpoint, config: PruneBlocksConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Write the pruned checkpoint and prove it to be the old one without those units."""
        _check_order(checkpoint)
        text, progress = workspace.calibration, workspace.progress
        judged = config.search != "one_shot" or config.heal != "none"
        unseen = (text.sequences // 2 or 1) if judged else 0
        rows = windows(
            text.data, checkpoint.tokenizer(), text.sequences + unseen, text.length, text.seed
        )
        tokens, heldout = rows[: text.sequences], rows[text.sequences :]
        model = load_float32(checkpoint)
        units = find_units(model, config.granularity)
        budget, total = _budget(checkpoint, model, units, config, text.length)
        selection = select(
            model,
            units,
            budget,
            tokens,
            heldout,
            scorer=config.scorer,
            search=config.search,
            evolution=config.evolution.settings(text.seed),
            seed=text.seed,
            journal=workspace.scratch,
            subject=checkpoint.fingerprint,
            threads=workspace.threads,
            progress=progress,
        )
        removed = _listed(selection.removed)
        healed = _heal(
            checkpoint, model, config, selection.removed, units, tokens, heldout, workspace
        )
        new = healed.weights if healed else {}
        infos = checkpoint.tensor_infos()
        apply_heal(model, new, infos, find_stack(infos, units.blocks))
        expected = output_without(model, tokens[0], selection.removed, units.parts)
        if not expected.isfinite().all():
            raise BadInput(
                "the pruned model would compute NaN or infinity",
                where=checkpoint.path,
                got=f"{removed} removed",
                mend="remove less, protect more blocks, or choose another rule or search",
            )
        del model  # before the pruned one is loaded
        renamed: dict[str, str] = {}
        gone: list[str] = []
        zeroed: list[str] = []
        if config.granularity == "block":
            pruned, renamed, gone = remove_blocks(
                checkpoint, removed["block"], workspace.directory, progress, replace=new
            )
        else:
            pruned, zeroed = drop_sublayers(
                checkpoint, *_by_kind(removed), workspace.directory, progress, replace=new
            )
        check_pruned(pruned, tokens[0], expected)
        return pruned, StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=_summary(config, units, selection, removed) + _words(config, healed),
            metrics={
                **_metrics(config, units, selection, removed),
                "budget": _spent(config, budget, total, selection.removed),
                "healing": healed and _told(healed),
                "bytes_in": total_nbytes(checkpoint),
                "bytes_out": total_nbytes(pruned),
                "stale_patterns": _warn(pruned, progress),
            },
            renamed=renamed,
            removed=gone,
            changed=[
                name
                for name in pruned.tensor_infos()
                if name in zeroed or renamed.get(name, name) in new
            ],
        )


def _check_order(checkpoint: CheckpointView) -> None:
    """Raise `BadInput` after a stage that must come later."""
    if "quantization_config" in dense_config(checkpoint.config):
        raise BadInput("prune before quantizing", where=checkpoint.path)
    if TOKENS in checkpoint.config:  # its layer would be another one
        raise BadInput("prune blocks before tokens", where=checkpoint.path)


def _least_saved(checkpoint: CheckpointView, config: PruneBlocksConfig, blocks: int) -> int:
    """What the smallest blocks take that may go, in bytes; parts stay, as zeros.

    With a budget it is one block. Raises `BadInput` where none of them can be removed.
    """
    kinds, drop = KINDS[config.granularity], config.drop or 1
    kept = protected_blocks(blocks, config.protect)
    free = [block for block in range(blocks) if block not in kept]
    infos = checkpoint.tensor_infos()
    tensors = unit_tensors(infos, find_stack(infos, blocks), kinds)
    if config.granularity != "block":
        skip_config(checkpoint.config, *_by_kind(dict.fromkeys(kinds[:1], free[:drop])))
        return 0
    sizes = {i: sum(infos[name].nbytes for name in names) for (_, i), names in tensors.items()}
    gone = sorted(free, key=lambda i: (sizes[i], i))[:drop]
    cut_config(checkpoint.config, [i for i in range(blocks) if i not in gone])
    return sum(sizes[i] for i in gone)


def _heal(
    checkpoint: Checkpoint,
    model: Any,
    config: PruneBlocksConfig,
    removed: Removal,
    units: Units,
    tokens: Any,
    unseen: Any,
    workspace: Workspace,
) -> Healed | None:
    """New weights for what stays, if any; none where "auto" meets a model that is not healed."""
    if config.heal == "none":
        return None
    try:
        return heal(
            model,
            checkpoint,
            removed,
            tokens,
            unseen,
            method="distill" if config.heal == "distill" else "linear",
            parts=units.parts,
            distillation=config.distillation.settings(workspace.calibration.seed),
            journal=workspace.scratch,
            subject=checkpoint.fingerprint,
            threads=workspace.threads,
            progress=workspace.progress,
        )
    except Unhealable as error:
        if config.heal != "auto":
            raise
        workspace.progress.note(f"not healed: {error}")
        return None  # the summary says so as well


def _budget(
    checkpoint: Checkpoint, model: Any, units: Units, config: PruneBlocksConfig, length: int
) -> tuple[Budget, int]:
    """What is to be saved, and what the whole model has of it."""
    free = units.free(config.protect)
    if config.budget is None:
        return Budget.of_units(free, config.drop or 0), len(units.kinds) * units.blocks
    measure, share = config.budget.stated
    costs, total = savings(measure, model, checkpoint, units, length)
    costs = {unit: costs[unit] for unit in free}
    most = _most_saved(units, costs) / total
    if share > most:
        raise BadInput(
            f"so large a share of the {measure.replace('_', ' ')} cannot be removed",
            where="prune_blocks.budget",
            got=share,
            expected=f"at most {math.floor(most * 1000) / 1000:g}, what may go and leaves a block",
        )
    return Budget(costs, max(1, math.ceil(share * total))), total


def _most_saved(units: Units, costs: Mapping[Unit, int]) -> int:
    """The largest target for which no set without a superfluous unit holds all of a kind."""
    if len(costs) < len(units.kinds) * units.blocks:
        return sum(costs.values())
    of = [[cost for (each, _), cost in costs.items() if each == kind] for kind in units.kinds]
    return min(sum(kind) - max(kind) for kind in of)


def _spent(
    config: PruneBlocksConfig, budget: Budget, total: int, removed: Removal
) -> dict[str, Any]:
    """What was asked and what was reached, in units or as a share of the model."""
    spent = budget.spent(removed)
    if config.budget is None:
        return {"measure": "drops", "asked": config.drop, "reached": spent}
    measure, share = config.budget.stated
    return {"measure": measure, "asked": share, "reached": round(spent / total, 6)}


def _listed(removal: Removal) -> dict[str, list[int]]:
    """By kind the blocks that lose it, ascending."""
    kinds = sorted({kind for kind, _ in removal})
    return {kind: sorted(i for each, i in removal if each == kind) for kind in kinds}


def _by_kind(removed: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """The blocks that lose their attention, and those that lose their MLP."""
    return removed.get("attention", []), removed.get("mlp", [])


def _summary(
    config: PruneBlocksConfig, units: Units, selection: Selection, removed: dict[str, list[int]]
) -> str:
    what = "; ".join(
        f"{'blocks' if kind == 'block' else f'{kind} of blocks'} {', '.join(map(str, blocks))}"
        for kind, blocks in removed.items()
    )
    search = selection.search
    if search is None:
        how = f"chosen by {config.scorer}"
    elif search.kept == "found":
        how = f"found by {config.search.replace('_', ' ')} search"
    else:
        how = f"chosen in one shot: {config.search.replace('_', ' ')} search found nothing better"
    return f"{what} of {units.blocks} removed, {how}"


def _metrics(
    config: PruneBlocksConfig, units: Units, selection: Selection, removed: dict[str, list[int]]
) -> dict[str, Any]:
    """All scorers' findings, what each would have removed, and how sure the choice is."""
    protected = protected_blocks(units.blocks, config.protect)
    search = selection.search
    stability = None
    if len(units.kinds) == 1 and config.scorer in SCORERS:
        [table] = selection.tables.values()
        stability = table.stability(config.scorer, config.protect, sum(map(len, removed.values())))
    return {
        "granularity": config.granularity,
        "blocks": units.blocks,
        "removed": removed,
        "signals": {kind: summarize(table, protected) for kind, table in selection.tables.items()},
        "stability": stability and {"same_choice": stability.same_choice, "ranks": stability.ranks},
        "candidates": [
            {"rule": each.rule, "removed": _listed(each.removed), "kl": _finite(each.kl)}
            for each in selection.candidates
        ],
        "search": search
        and {
            **asdict(search),
            "one_shot_kl": _finite(search.one_shot_kl),
            "found_kl": _finite(search.found_kl),
            "kept": search.kept,
        },
    }


def _finite(kl: float | None) -> float | None:
    """None also for infinity, which JSON has not."""
    return None if kl is None or math.isinf(kl) else kl


def _words(config: PruneBlocksConfig, healed: Healed | None) -> str:
    if healed is None:
        return ", which cannot be healed" if config.heal == "auto" else ""
    how = "a linear fold" if healed.method == "linear" else "distillation"
    return f", healed by {how}" if healed.kept else f", {how} did not help"


def _told(healed: Healed) -> dict[str, Any]:
    """A healing without its weights."""
    return {
        "method": healed.method,
        "kl_before": _finite(healed.kl_before),
        "kl_after": _finite(healed.kl_after),
        "kept": healed.kept,
        "history": list(healed.history),
    }


def _warn(pruned: Checkpoint, progress: Progress) -> list[str]:
    stale = stale_patterns(pruned.config)
    if stale:
        progress.note(
            f"{', '.join(stale)} no longer follow the pattern in config.json: readers that derive "
            "them from it would be wrong, transformers is not"
        )
    return stale
