"""`prune_blocks`: whole transformer blocks removed, those that a scorer finds to add least."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compress.checkpoint import Checkpoint, dense_config
from compress.errors import BadInput
from compress.progress import Progress
from compress.prune import (
    apply_heal,
    block_count,
    check_drop,
    check_pruned,
    choose,
    cut_config,
    find_stack,
    fit_linear_heal,
    model_config,
    output_without,
    remove_blocks,
    stale_patterns,
)
from compress.signals import (
    SCORERS_DEFAULT,
    BlockTable,
    check_length,
    collect,
    load_float32,
    load_text,
    protected_blocks,
    summarize,
    windows,
)
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

Scorer = Literal[
    "knn_entropy",
    "bucket_entropy",
    "renyi_entropy",
    "gaussian_entropy",
    "matrix_entropy",
    "effective_rank",
    "nuclear_norm",
    "diffusion_entropy",
    "cosine",
    "norm_ratio",
    "angular",
]


class PruneBlocksConfig(StageConfig):
    """``protect``: indices of blocks that stay; by default the first two and the last. ``heal``:
    "linear" folds what the removed blocks did, as far as it is linear, into those before them.
    """

    drop: int = Field(ge=1)
    scorer: Scorer = "knn_entropy"
    heal: Literal["none", "linear"] = "none"
    protect: list[Annotated[int, Field(ge=0)]] | None = None


@register
class PruneBlocks:
    """Measure every block in one calibration pass, remove the lowest-scoring, prove the outcome."""

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
        """The size without the smallest blocks that may go: exact where all blocks are equal.

        Raises `BadInput` where so many blocks cannot go, the model or its config is not one that
        blocks can be removed from, or the calibration text is not there.
        """
        if "quantization_config" in dense_config(checkpoint.config):
            raise BadInput("prune before quantizing", where=checkpoint.path)
        blocks = block_count(checkpoint.config)
        check_drop(blocks, config.drop, config.protect)
        check_length(model_config(checkpoint.config), calibration.length)
        load_text(calibration.data)
        infos = checkpoint.tensor_infos()
        stack = find_stack(infos, blocks)
        kept = protected_blocks(blocks, config.protect)
        sizes: Counter[int | None] = Counter()
        for name, info in infos.items():
            sizes[stack.block(name)] += info.nbytes
        gone = sorted((i for i in range(blocks) if i not in kept), key=lambda i: (sizes[i], i))
        gone = gone[: config.drop]
        cut_config(checkpoint.config, [i for i in range(blocks) if i not in gone])
        changes = [f"{config.drop} of {blocks} blocks removed, chosen by {config.scorer}"]
        return Estimate(sizes.total() - sum(sizes[i] for i in gone), changes)

    def run(
        self, checkpoint: Checkpoint, config: PruneBlocksConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Write the pruned checkpoint and prove it to be the old one without those blocks."""
        text = workspace.calibration
        tokens = windows(text.data, checkpoint.tokenizer(), text.sequences, text.length, text.seed)
        model = load_float32(checkpoint)
        scorers = list(dict.fromkeys((*SCORERS_DEFAULT, config.scorer)))
        table = collect(
            model,
            tokens,
            scorers=scorers,
            threads=workspace.threads,
            progress=workspace.progress,
        )
        removed = choose(table, config.scorer, config.drop, config.protect)
        healed = (
            _heal(checkpoint, model, tokens, removed, workspace) if config.heal != "none" else {}
        )
        expected = output_without(model, tokens[0], removed)
        del model  # before the pruned one is loaded
        pruned, renamed, gone = remove_blocks(
            checkpoint, removed, workspace.directory, workspace.progress, replace=healed
        )
        check_pruned(pruned, tokens[0], expected)
        return pruned, StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=_summary(table, config, removed),
            metrics=_metrics(checkpoint, pruned, table, config, removed)
            | {"stale_patterns": _warn(pruned, workspace.progress)},
            renamed=renamed,
            removed=gone,
            changed=[name for name in pruned.tensor_infos() if renamed.get(name, name) in healed],
        )


def _heal(
    checkpoint: Checkpoint, model: Any, tokens: Any, removed: list[int], workspace: Workspace
) -> dict[str, Any]:
    """New weights by old names for the blocks before the gaps, put into the model as well."""
    infos = checkpoint.tensor_infos()
    stack = find_stack(infos, block_count(checkpoint.config))
    healed = fit_linear_heal(
        model,
        tokens,
        removed,
        stack,
        threads=workspace.threads,
        progress=workspace.progress,
    )
    apply_heal(model, healed, infos, stack)
    return healed


def _summary(table: BlockTable, config: PruneBlocksConfig, removed: list[int]) -> str:
    numbers = ", ".join(map(str, removed))
    healed = "" if config.heal == "none" else f", healed by a {config.heal} fold"
    return f"blocks {numbers} of {table.blocks} removed, chosen by {config.scorer}{healed}"


def _metrics(
    before: Checkpoint,
    after: Checkpoint,
    table: BlockTable,
    config: PruneBlocksConfig,
    removed: list[int],
) -> dict[str, Any]:
    """All scorers' findings, which blocks each would have removed, and how sure the choice is."""
    stability = table.stability(config.scorer, config.protect, config.drop)
    return {
        **summarize(table, protected_blocks(table.blocks, config.protect)),
        "removed": removed,
        "would_remove": {
            scorer: choose(table, scorer, config.drop, config.protect) for scorer in table.values
        },
        "stability": stability and {"same_choice": stability.same_choice, "ranks": stability.ranks},
        "bytes_in": total_nbytes(before),
        "bytes_out": total_nbytes(after),
    }


def _warn(pruned: Checkpoint, progress: Progress) -> list[str]:
    stale = stale_patterns(pruned.config)
    if stale:
        progress.note(
            f"{', '.join(stale)} no longer follow the pattern in config.json: readers that derive "
            "them from it would be wrong, transformers is not"
        )
    return stale
