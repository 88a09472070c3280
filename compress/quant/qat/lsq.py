"""Steps that are learned with the weights.

Esser et al., "Learned Step Size Quantization", arXiv 1902.08153: a step has the gradient of
equation 3 times ``1 / sqrt(weights * highest code)`` (section 2.2), weights being those that share
it. Here its logarithm is the parameter: it stays positive, and a rate is a share of the step,
whatever the size of the weights. Imports torch.
"""

from __future__ import annotations

import math

import torch

from compress.errors import BadInput
from compress.quant.qat.fake_weight import FakeWeight
from compress.quant.qtensor import Scheme, check_finite

_SHARES = tuple(part / 20 for part in range(20, 5, -1))  # of the step that clips nothing


class Lsq(FakeWeight):
    """With one step a row or group of columns as the scheme says, or ``per_tensor`` a single one.

    ``start``: steps to begin from, of any float dtype, [rows, groups] (of which ``per_tensor``
    takes the geometric mean), in place of `least_squares_step`. Raises `BadInput` for others, and
    as `FakeWeight`.
    """

    def __init__(
        self,
        w: torch.Tensor,
        scheme: Scheme,
        stored: torch.dtype,
        name: str,
        *,
        per_tensor: bool = False,
        start: torch.Tensor | None = None,
    ) -> None:
        super().__init__(w, scheme, stored, name)
        shape = torch.Size(self._shape[:2])
        if start is not None and (start.shape != shape or not bool((start > 0).all())):
            raise BadInput(
                "no steps to start from",
                where=name,
                got=list(start.shape),
                expected=f"positive ones, {list(shape)}",
            )
        groups = self.weight.detach().view((1, 1, -1) if per_tensor else self._shape)
        check_finite(groups.abs().amax(2), name, 0)
        if start is None:
            log_step = least_squares_step(groups, self.limit).log()
        else:
            log_step = start.to(w.device).float()[..., None].log()
            log_step = log_step.mean().view(1, 1, 1) if per_tensor else log_step
        self.log_step = torch.nn.Parameter(log_step)
        self._sharing = groups.shape[2]

    def exact_step(self) -> torch.Tensor:
        return self.log_step.exp()

    def step_share(self) -> float:
        return 1 / math.sqrt(self._sharing * self.limit)


def least_squares_step(groups: torch.Tensor, limit: int) -> torch.Tensor:
    """The step of least squared error among 15, for each group; ``groups`` float32 [.., weights].

    From 1 to 0.3 times the least one at which nothing is clipped. A group of zeros gets 1. The
    paper's ``2 mean|w| / sqrt(limit)`` is for training from the beginning.
    """
    widest = groups.abs().amax(-1, keepdim=True) / limit
    widest = torch.where(widest > 0, widest, torch.ones_like(widest))
    widest = widest.clamp(min=torch.finfo(torch.float32).tiny)
    best, least = widest, torch.full_like(widest, math.inf)
    for share in _SHARES:
        step = (share * widest).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (groups / step).round_().clamp_(-limit, limit)
        # in steps of the widest, whose squares always fit
        error = ((codes * step - groups) / widest).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best
