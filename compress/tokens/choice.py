"""What each selector's choice of tokens costs a model on calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.progress import SILENT, Progress
from compress.tokens.engine import last_report, pruning
from compress.tokens.policy import TokenPolicy

if TYPE_CHECKING:
    import torch

RANDOM = "random"


def token_losses(
    model: Any,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    policy: TokenPolicy,
    selectors: Sequence[str],
    *,
    draws: int = 3,
    progress: Progress = SILENT,
) -> dict[str, list[float]]:
    """By selector the loss of each input, in nats a token: ``KL(whole || pruned)``.

    ``model``: in eval mode, not pruned; ``inputs``: of one sequence each, on any device, as the
    model's processor makes them; ``policy``: all but the selector. Counted are next-token
    distributions: of a text those of its ``recent`` tokens; of a prompt with images that of its
    last token, with which the answer begins. (What the words of a question would be followed by
    depends on an image as well, and says nothing about the answer.) "random" is the mean over so
    many ``draws``, and always there. The logits of one sequence are held at a time.

    Raises `BadInput` as `pruning`, for an input in which nothing is pruned or nothing comes after
    it, and for a model that computes NaN.
    """
    import torch

    device = next(model.parameters()).device
    named = dict.fromkeys([RANDOM, *selectors])
    losses: dict[str, list[float]] = {name: [] for name in named}
    plain = replace(policy, selector=RANDOM, options={})
    tries = [replace(plain, seed=policy.seed + draw) for draw in range(draws)]
    tries += [replace(plain, selector=name) for name in named if name != RANDOM]
    with (
        progress.step("comparing selectors", len(inputs) * len(tries), "prompts") as step,
        torch.inference_mode(),
    ):
        for number, batch in enumerate(inputs):
            given = {name: value.to(device) for name, value in batch.items()}
            whole = _log_p(model(**given, use_cache=False).logits[0], number)
            found: dict[str, list[float]] = {name: [] for name in named}
            for one in tries:
                if one.selector == RANDOM:  # else prompts of one form would share one draw
                    one = replace(one, seed=one.seed + len(tries) * number)
                with pruning(model, one):
                    logits = model(**given, use_cache=False).logits[0]
                    counted = _counted(model, len(logits), number, policy.target)
                p, q = whole[counted], logits[counted].float().log_softmax(-1)
                kl = float((p.exp() * (p - q)).sum(-1).double().mean())
                found[one.selector].append(kl if kl == kl else float("inf"))
                step.advance(1)
            for name, values in found.items():
                losses[name].append(sum(values) / len(values))
    return losses


def _log_p(logits: torch.Tensor, number: int) -> torch.Tensor:
    if not bool(logits.isfinite().all()):
        raise BadInput("the model's logits are not finite", where=f"calibration input {number}")
    return logits.float().log_softmax(-1)


def _counted(model: Any, length: int, number: int, target: str) -> torch.Tensor:
    """Which tokens' predictions count, bool [length]."""
    import torch

    report = last_report(model)
    segments = report.segments if report else ()
    if not segments:
        raise BadInput("holds no token that may be pruned", where=f"calibration input {number}")
    counted = torch.zeros(length, dtype=torch.bool)
    first = length - 1 if target == "visual" else min(segment.start for segment in segments)
    counted[first:] = True
    for segment in segments:
        counted[segment.start : segment.start + segment.tokens] = False
    if not bool(counted.any()):
        raise BadInput(
            "nothing comes after what may be pruned", where=f"calibration input {number}"
        )
    return counted
