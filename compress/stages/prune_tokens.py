"""`prune_tokens`: which tokens of a prompt are left out, and where, if it is better than chance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from compress.checkpoint import TOKENS, Checkpoint, NewTensor, TensorInfo, dense_config, rewrite
from compress.errors import BadInput, did_you_mean
from compress.evaluate import FEWEST, Interval, bootstrap_interval
from compress.prune import model_config
from compress.signals import check_length, load_float32, load_text, significant, windows
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
from compress.stages.overlay import pictures
from compress.stages.visual_inputs import read_examples, visual_inputs
from compress.tokens import (
    SELECTORS,
    KeepBudget,
    TokenPolicy,
    check_family,
    collapse_layer,
    count_tokens,
    find_family,
    layer_entropies,
    predicted_flops,
    token_losses,
)

if TYPE_CHECKING:
    import torch

AUTO = "auto"
_FEWEST = 4  # layers in which one can be told to collapse
_LAYER = 2  # where no layer collapses: what EntropyPrune's authors use for LLaVA
_CANDIDATES = ("logdet", "divprune", "von_neumann", "renyi2", "energy", "fastv", "uniform")


def _known(name: str) -> str:
    if name != AUTO and name not in SELECTORS:
        raise ValueError(f"'{name}' is not known, {did_you_mean(name, SELECTORS)}")
    return name


Named = Annotated[str, AfterValidator(_known)]


class TokenBudget(StageConfig):
    """One of: ``average``, the tokens averaged over layers, ``flops``, a share of the prompt's."""

    average: float | None = Field(default=None, gt=0)
    flops: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one(self) -> TokenBudget:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("a budget is one of average and flops")
        return self

    def budget(self) -> KeepBudget:
        """As the library has it; a whole number of 1 or more counts tokens."""
        [(measure, amount)] = self.model_dump(exclude_none=True).items()
        tokens = measure == "average" and amount >= 1 and float(amount).is_integer()
        return KeepBudget(measure, int(amount) if tokens else amount)


class PruneTokensConfig(StageConfig):
    """``target``: "visual" tokens, or those of "text".

    Either ``keep``, the share of each image (or text) that stays, or a ``budget``. ``layer``:
    before which decoder layer tokens go; "auto" is where their entropy collapses, or the third.
    ``selector``: "auto" is the one of ``candidates`` that loses least on calibration inputs, if it
    is better than chance on others; one that is named is measured as well, and used if ``insist``
    or better than chance. ``inputs``: of visual tokens a JSON-lines file of ``{"image": PATH,
    "text": PROMPT}``. ``pictures``: whether up to three of the images go into the manifest.
    """

    target: Literal["visual", "text"] = "visual"
    keep: float | None = Field(default=None, gt=0, le=1)
    budget: TokenBudget | None = None
    layer: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    selector: Named = AUTO
    candidates: tuple[Named, ...] = _CANDIDATES
    insist: bool = False
    inputs: str | None = None
    draws: int = Field(default=3, ge=1)
    pictures: bool = False
    sinks: int = Field(default=4, ge=0)
    recent: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _together(self) -> PruneTokensConfig:
        if (self.keep is None) == (self.budget is None):
            raise ValueError("it takes either keep or budget")
        if self.selector == AUTO and (self.insist or not self.candidates):
            raise ValueError("selector: auto takes candidates, and insists on none")
        if self.pictures and self.target != "visual":
            raise ValueError("pictures are of visual tokens")
        if self.target == "visual" and self.inputs is None:
            raise ValueError("visual tokens need inputs: a JSON-lines file of images and prompts")
        return self

    @property
    def tried(self) -> tuple[str, ...]:
        """The selectors that are measured."""
        return self.candidates if self.selector == AUTO else (self.selector,)


@dataclass(frozen=True)
class _Verdict:
    """``losses``: mean KL in nats a token by selector; ``less``: chance's less the chosen one's."""

    chosen: str
    losses: dict[str, float]
    less: Interval

    @property
    def interval(self) -> dict[str, float]:
        """As a manifest has it."""
        found = {"estimate": self.less.estimate, "low": self.less.low, "high": self.less.high}
        return {name: significant(value) for name, value in found.items()}


@register
class PruneTokens:
    """Choose a policy on calibration inputs and store it in the config; no weight changes.

    Coded checkpoints follow it by themselves once loaded; others by
    `compress.tokens.attach_stored`.
    """

    name: ClassVar[str] = "prune_tokens"
    Config: ClassVar[type[StageConfig]] = PruneTokensConfig
    lossless: ClassVar[bool] = False

    def plan(
        self,
        checkpoint: CheckpointView,
        config: PruneTokensConfig,
        calibration: Calibration,
        exact: bool = True,
    ) -> Estimate:
        """The same size. Raises `BadInput` for a model or layer that has no place for it."""
        layer = _LAYER if config.layer == AUTO else int(config.layer)
        check_family(model_config(checkpoint.config), _policy(config, layer, 1.0, calibration.seed))
        if config.target == "visual":
            read_examples(str(config.inputs))
        else:
            check_length(model_config(checkpoint.config), calibration.length)
            load_text(calibration.data)
        how = f"keep {config.keep:g}" if config.keep else f"budget {config.budget}"
        change = f"{config.target} tokens of prompts left out by {config.selector}, {how}"
        return Estimate(total_nbytes(checkpoint), [change])

    def run(
        self, checkpoint: Checkpoint, config: PruneTokensConfig, workspace: Workspace
    ) -> tuple[Checkpoint, StageReport]:
        """Write the checkpoint with the policy. Raises `BadInput` where chance is no worse."""
        text, progress = workspace.calibration, workspace.progress
        model, inputs = _loaded(checkpoint, config, workspace)
        table = layer_entropies(model, inputs, progress=progress)
        collapse = collapse_layer(table) if table.shape[1] >= _FEWEST else None
        layer = (collapse or _LAYER) if config.layer == AUTO else int(config.layer)
        policy = _policy(config, layer, 1.0, text.seed)
        layer = find_family(model, policy).layer  # some models put it off
        counts = [count_tokens(model.config, given["input_ids"], policy) for given in inputs]
        policy = replace(policy, layer=layer, keep=_share(config, model.config, layer, counts))
        verdict = _judge(model, inputs, policy, config, workspace)
        policy = replace(policy, selector=verdict.chosen)
        seen = []
        if config.pictures:
            seen = pictures(model, policy, read_examples(str(config.inputs)), inputs)
        stated = model.config
        del model

        def same(info: TensorInfo) -> Iterator[NewTensor]:
            yield NewTensor(info.name, info.dtype, info.shape, checkpoint.chunks(info.name))

        done, _ = rewrite(
            checkpoint,
            workspace.directory,
            same,
            config={**dense_config(checkpoint.config), TOKENS: policy.to_json()},
            metadata={"format": "pt"} if checkpoint.coded else None,
            progress=progress,
            label="writing the policy",
        )
        share = _flops_share(stated, policy, counts)
        return done, StageReport(
            stage=self.name,
            config={**config.model_dump(mode="json"), "inputs": _recorded(config.inputs)},
            summary=f"{policy.keep:.3g} of the {config.target} tokens stay from layer {layer} on, "
            f"by {policy.selector}; {share:.3g} of the FLOPs of a prompt",
            metrics={
                "policy": policy.to_json(),
                "collapse_layer": collapse,
                "entropies": [significant(float(mean)) for mean in table.mean(0)],
                "losses": {
                    name: significant(loss) if math.isfinite(loss) else None
                    for name, loss in verdict.losses.items()
                },
                "less_than_random": verdict.interval,
                "inputs": len(counts),
                "tokens": significant(sum(free for free, _ in counts) / len(counts)),
                "flops_share": significant(share),
                "pictures": seen,
                "bytes_in": total_nbytes(checkpoint),
                "bytes_out": total_nbytes(done),
            },
        )


def _loaded(
    checkpoint: Checkpoint, config: PruneTokensConfig, workspace: Workspace
) -> tuple[Any, list[Any]]:
    """The model in float32, and calibration inputs of one sequence each."""
    import torch

    text = workspace.calibration
    if config.target == "text":
        tokens = windows(text.data, checkpoint.tokenizer(), text.sequences, text.length, text.seed)
        return load_float32(checkpoint), [{"input_ids": row[None]} for row in tokens]
    inputs = visual_inputs(checkpoint, read_examples(str(config.inputs))[: text.sequences])
    return checkpoint.load_model(dtype=torch.float32), inputs


def _policy(config: PruneTokensConfig, layer: int, keep: float, seed: int) -> TokenPolicy:
    """One whose selector is still open."""
    return TokenPolicy(
        layer=layer,
        keep=keep,
        selector="random",
        target=config.target,
        seed=seed,
        sinks=config.sinks,
        recent=config.recent,
    )


def _share(
    config: PruneTokensConfig, stated: Any, layer: int, counts: Sequence[tuple[int, int]]
) -> float:
    """What share of the tokens stays: as asked for, or what a budget allows the mean input."""
    if config.budget is None:
        return float(config.keep or 1.0)
    free, rest = (round(sum(numbers) / len(counts)) for numbers in zip(*counts, strict=True))
    kept = config.budget.budget().resolve(stated, layer=layer, visual=free, text=rest)
    return kept / free


def _flops_share(stated: Any, policy: TokenPolicy, counts: Sequence[tuple[int, int]]) -> float:
    layers = stated.get_text_config(decoder=True).num_hidden_layers
    after = layers - policy.layer
    full = pruned = 0
    for free, rest in counts:
        total = free + rest
        full += predicted_flops(stated, [total] * layers, logits=1)
        lengths = [total] * policy.layer + [policy.count(free) + rest] * after
        pruned += predicted_flops(stated, lengths, logits=1)
    return pruned / full


def _judge(
    model: Any,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    policy: TokenPolicy,
    config: PruneTokensConfig,
    workspace: Workspace,
) -> _Verdict:
    """The selector that loses least on the first half of the inputs, against chance on the others.

    Raises `BadInput` where it is not better than chance beyond the interval.
    """
    import numpy as np

    progress = workspace.progress
    half = len(inputs) // 2
    if len(inputs) - half < FEWEST:
        raise BadInput(
            "too few inputs to tell a selector from chance",
            where="prune_tokens",
            got=len(inputs),
            expected=f"{2 * FEWEST} or more",
        )
    draws = config.draws
    first = token_losses(model, inputs[:half], policy, config.tried, draws=draws, progress=progress)
    means = {name: sum(losses) / len(losses) for name, losses in first.items()}
    chosen = min(config.tried, key=lambda name: means[name])
    judged = token_losses(model, inputs[half:], policy, [chosen], draws=draws, progress=progress)
    columns = [np.array(judged[name]) for name in ("random", chosen)]
    less = bootstrap_interval(
        lambda chance, own, axis: (chance - own).mean(axis), columns, seed=policy.seed
    )
    if less.low <= 0 and not config.insist:
        raise BadInput(
            "no selector loses less than chance, so no tokens are pruned",
            where="prune_tokens",
            got=f"{chosen} at {means[chosen]:.4g} nats a token, random {means['random']:.4g}; on "
            f"other inputs it is less by {less.estimate:.3g} [{less.low:.3g}, {less.high:.3g}]",
            mend="keep more, prune before a later layer, give more inputs, or insist on a selector",
        )
    return _Verdict(chosen, means, less)


def _recorded(inputs: str | None) -> str | None:
    """The file's name, without a path of this machine."""
    return inputs and Path(inputs).name
