"""`prune_sublayers`: the attention or the MLP of some blocks silenced, those that add least."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compress.checkpoint import Checkpoint
from compress.prune import (
    block_count,
    check_drop,
    check_pruned,
    choose,
    drop_sublayers,
    find_sublayers,
    model_config,
    output_without_sublayers,
    skip_config,
    sublayer_parts,
)
from compress.signals import (
    SCORERS_DEFAULT,
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
from compress.stages.prune_blocks import Scorer


class PruneSublayersConfig(StageConfig):
    """``protect``: blocks whose parts stay; by default the first two and the last."""

    part: Literal["attention", "mlp"] = "attention"
    drop: int = Field(ge=1)
    scorer: Scorer = "norm_ratio"
    protect: list[Annotated[int, Field(ge=0)]] | None = None


@register
class PruneSublayers:
    """Measure one kind of sublayer in one calibration pass, zero the lowest-scoring, prove it.

    The outcome is an ordinary checkpoint that every loader runs correctly: the weights are zero,
    which code to nothing, and ``per_layer_config`` names them, so that
    `compress.hf.skipping.skip_sublayers` can leave them out and run faster.
    """

    name: ClassVar[str] = "prune_sublayers"
    Config: ClassVar[type[StageConfig]] = PruneSublayersConfig
    lossless: ClassVar[bool] = False

    def plan(
        self,
        checkpoint: CheckpointView,
        config: PruneSublayersConfig,
        calibration: Calibration,
        exact: bool = True,
    ) -> Estimate:
        """The size as it is: zeros take their room until they are coded.

        Raises `BadInput` where so many cannot go or the config is not one that allows it.
        """
        blocks = block_count(checkpoint.config)
        check_drop(blocks, config.drop, config.protect, where="prune_sublayers.drop")
        check_length(model_config(checkpoint.config), calibration.length)
        load_text(calibration.data)
        kept = protected_blocks(blocks, config.protect)
        some = [block for block in range(blocks) if block not in kept][: config.drop]
        skip_config(checkpoint.config, *_by_part(config, some))
        what = f"{config.part} of {config.drop} of {blocks} blocks"
        return Estimate(total_nbytes(checkpoint), [f"{what} zeroed, chosen by {config.scorer}"])

    def run(
        self, checkpoint: Checkpoint, config: PruneSublayersConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Write the checkpoint and prove it to be the old one without those sublayers."""
        text = workspace.calibration
        tokens = windows(text.data, checkpoint.tokenizer(), text.sequences, text.length, text.seed)
        model = load_float32(checkpoint)
        table = collect(
            model,
            tokens,
            parts=sublayer_parts(model, find_sublayers(model), config.part),
            scorers=list(dict.fromkeys((*SCORERS_DEFAULT, config.scorer))),
            threads=workspace.threads,
            progress=workspace.progress,
        )
        removed = choose(table, config.scorer, config.drop, config.protect)
        expected = output_without_sublayers(model, tokens[0], *_by_part(config, removed))
        del model  # before the new one is loaded
        pruned, zeroed = drop_sublayers(
            checkpoint, *_by_part(config, removed), workspace.directory, workspace.progress
        )
        check_pruned(pruned, tokens[0], expected)
        numbers = ", ".join(map(str, removed))
        stability = table.stability(config.scorer, config.protect, config.drop)
        return pruned, StageReport(
            stage=self.name,
            config=config.model_dump(mode="json"),
            summary=f"{config.part} of blocks {numbers} of {table.blocks} zeroed, "
            f"chosen by {config.scorer}",
            metrics={
                **summarize(table, protected_blocks(table.blocks, config.protect)),
                "silenced": removed,
                "would_silence": {
                    scorer: choose(table, scorer, config.drop, config.protect)
                    for scorer in table.values
                },
                "same_choice": stability and stability.same_choice,
            },
            changed=zeroed,
        )


def _by_part(config: PruneSublayersConfig, blocks: list[int]) -> tuple[list[int], list[int]]:
    """The blocks as those whose attention goes and those whose MLP does."""
    return (blocks, []) if config.part == "attention" else ([], blocks)
