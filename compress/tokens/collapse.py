"""Before which layer visual tokens come to say the same: the Entropy Collapse Layer, if any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.signals import block_input, find_blocks, massive_tokens
from compress.tokens.families import visual_ids

if TYPE_CHECKING:
    import torch


def layer_entropies(
    model: Any, batches: Sequence[Mapping[str, torch.Tensor]], *, progress: Progress = SILENT
) -> torch.Tensor:
    """`set_entropy` of the tokens that enter each decoder layer: float64 [samples, layers].

    ``batches``: inputs of the transformers ``model``, which is in eval mode and not pruned, as its
    processor makes them: ``input_ids``, ``attention_mask`` where there is padding, images. Each
    sequence is a sample, all visual tokens of it together; of a model without images, all tokens
    but padding and the first. Massive ones, the same in every layer, are left out: a layer that
    makes a few tokens massive would look like a collapse, as it does by the paper's definition.
    Raises `BadInput` for a sequence with fewer than two tokens to measure, and, naming the layer,
    for states that are not finite.
    """
    import torch

    blocks = find_blocks(model.get_decoder())
    device = next(model.parameters()).device
    table: list[list[float]] = []
    masks: list[torch.Tensor] = []
    states: list[list[torch.Tensor]] = []  # by sequence and layer

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        for rows, mask, state in zip(states, masks, block_input(args, kwargs), strict=True):
            rows.append(state[mask])

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    total = sum(len(batch["input_ids"]) for batch in batches)
    try:
        with progress.step("measuring entropies", total, "sequences") as step:
            for batch in batches:
                inputs = {name: value.to(device) for name, value in batch.items()}
                visual = _visual(model.config, inputs["input_ids"])
                attended = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
                masks[:] = attended.bool() if visual is None else visual
                states[:] = [[] for _ in masks]
                with torch.inference_mode():
                    model.base_model(**inputs, use_cache=False)
                    for rows in states:
                        ordinary = enumerate(_ordinary(rows, text=visual is None))
                        table.append([_entropy(layer, x) for layer, x in ordinary])
                        step.advance(1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor(table, dtype=torch.float64)


def _visual(config: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Which tokens stand for parts of images or videos; None where the model knows neither."""
    import torch

    ids = visual_ids(config)
    return torch.isin(tokens, torch.tensor(ids, device=tokens.device)) if ids else None


def _ordinary(rows: Sequence[torch.Tensor], text: bool) -> list[torch.Tensor]:
    """Without what is massive in any layer and, of a text, its first token, where sinks form."""
    import torch

    keep = torch.ones(len(rows[0]), dtype=torch.bool, device=rows[0].device)
    for x in rows if len(keep) else ():
        keep &= ~massive_tokens(x.float(), torch.ones_like(keep))
    keep[: int(text)] = False
    return [x[keep] for x in rows]


def _entropy(layer: int, x: torch.Tensor) -> float:
    if len(x) < 2:
        raise BadInput(
            "too few tokens to measure", got=len(x), expected="2 or more in every sequence"
        )
    if not x.isfinite().all():
        raise BadInput("states of tokens are not finite", where=f"what enters layer {layer}")
    return set_entropy(x)


def set_entropy(x: torch.Tensor) -> float:
    """Matrix entropy of a set of hidden states, float [N, D] with N, D > 1: 0 to 1.

    EntropyPrune's (arXiv 2602.17196): ``-sum_i p_i ln p_i / ln min(N, D)`` over the eigenvalues
    ``p`` of the covariance at trace 1, by the smaller Gram matrix of the centred rows, which are
    not made equally long as for `matrix_entropy`. 0 where the rows do not differ.
    """
    import torch

    x = x.double()
    x = x - x.mean(dim=0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min_(0)
    total = values.sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values / total).sum().item() / math.log(min(x.shape))


def collapse_layer(
    table: torch.Tensor | Sequence[Sequence[float]], *, sigma: float = 2.0, share: float = 0.9
) -> int | None:
    """The layer before which tokens should go, from the ``table`` of `layer_entropies`, or None.

    That whose preceding layer takes most entropy away in the mean over samples, among layers 1 to
    L/2. "A sharp and consistent drop" (arXiv 2602.17196) is taken to mean: in at least ``share`` of
    the samples the drop is above 0 and exceeds the mean of the other layers' drops by more than
    ``sigma`` times their standard deviation. The authors release no detector and set the layer by
    hand. None where there is no such drop: many models have none. Raises `BadInput` for fewer than
    4 layers, and for entropies that are not finite.
    """
    import torch

    entropies = torch.as_tensor(table, dtype=torch.float64)
    if entropies.ndim != 2 or not len(entropies) or entropies.shape[1] < 4:
        raise BadInput(
            "no table of entropies",
            got=list(entropies.shape),
            expected="[samples, layers] with 1 sample and 4 layers or more",
        )
    if not entropies.isfinite().all():
        raise BadInput("entropies of layers are not finite")
    drops = -entropies.diff(dim=1)
    layer = int(drops[:, : entropies.shape[1] // 2].mean(dim=0).argmax()) + 1
    drop = drops[:, layer - 1]
    others = torch.cat([drops[:, : layer - 1], drops[:, layer:]], dim=1)
    limit = others.mean(dim=1).clamp(min=0) + sigma * others.std(dim=1)
    return layer if (drop > limit).double().mean() >= share else None


def segment_by_entropy(series: Sequence[float], threshold: float) -> list[int]:
    """By layer the stage it belongs to, counted from 0 (UNComp, arXiv 2410.03090).

    A stage begins where entropy falls by more than ``threshold`` from the layer before.
    """
    stages = [0]
    for before, after in pairwise(series):
        stages.append(stages[-1] + (after - before < -threshold))
    return stages[: len(series)]
