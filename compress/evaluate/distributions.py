"""Two models' next-token distributions, compared token by token."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from compress.signals import one_thread_each

if TYPE_CHECKING:
    import torch

MEASURES = ("nll_reference", "nll", "kl", "kl_top_k", "jsd", "top1_agreement", "flip_rate")
_SLICE = 16  # tokens whose distributions a thread has at a time: few, so that they stay in cache


def compare_logits(
    reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor, top_k: int
) -> dict[str, float]:
    """The `MEASURES` summed over tokens, from logits [tokens, vocabulary] of any float dtype.

    ``targets``: int64 [tokens], what came next. ``nll_reference`` and ``nll``: its negative log-
    likelihoods; ``kl``: ``KL(p || q)``, ``p`` the reference; ``kl_top_k``: the same with all tokens
    but the ``top_k`` likeliest in ``p`` taken as one; ``jsd``: ``KL(p || m) / 2 + KL(q || m) / 2``
    for ``m = (p + q) / 2``, all in nats; ``top1_agreement``: 1 where ``q`` is largest where ``p``
    is; ``flip_rate``: 1 where one has the target as its largest and the other has not. float32 for
    a few tokens at a time, float64 sums, which do not depend on the number of threads. Some are NaN
    or infinite where a logit is.
    """
    import torch

    slices = [tensor.split(_SLICE) for tensor in (reference, candidate, targets[:, None])]
    workers = torch.get_num_threads() if reference.device.type == "cpu" else 1
    workers = min(workers, len(slices[0]))

    def work(first: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            # New memory for every slice would cost more than the arithmetic.
            buffers = torch.empty(4, _SLICE, reference.shape[1], device=reference.device)
            return [
                _sums(a, b, target, top_k, buffers[:, : len(target)])
                for a, b, target in zip(*(each[first::workers] for each in slices), strict=True)
            ]

    # On two cores, threads that share each small operation spend most of their time waiting.
    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        shares = list(pool.map(work, range(workers)))
    sums = [shares[index % workers][index // workers] for index in range(len(slices[0]))]
    return dict(zip(MEASURES, torch.stack(sums).sum(dim=0).tolist(), strict=True))


def _sums(
    a: torch.Tensor, b: torch.Tensor, target: torch.Tensor, top_k: int, buffers: torch.Tensor
) -> torch.Tensor:
    """The `MEASURES` of a few tokens, float64 [measures]; overwrites ``buffers``."""
    import torch

    best, top = a.topk(min(top_k, a.shape[1]), dim=1)
    b_best = b.amax(dim=1, keepdim=True)
    agrees = b.gather(1, top[:, :1]) == b_best
    flips = (a.gather(1, target) == best[:, :1]) != (b.gather(1, target) == b_best)

    p, q, log_ratio, middle = buffers
    torch.log_softmax(a, 1, torch.float32, out=p)
    torch.log_softmax(b, 1, torch.float32, out=q)
    nll_reference, nll = -p.gather(1, target), -q.gather(1, target)
    torch.sub(p, q, out=log_ratio)
    top_log_ratio = log_ratio.gather(1, top)
    p.exp_()
    q.exp_()
    # ln(m / q) = ln(p / q + 1) - ln 2, so that JSD = (KL - sum (p + q) ln(m / q)) / 2
    torch.logaddexp(log_ratio, log_ratio.new_zeros(()), out=middle).sub_(math.log(2))
    kl = log_ratio.mul_(p).sum(dim=1)
    jsd = (kl - torch.add(p, q, out=log_ratio).mul_(middle).sum(dim=1)) / 2
    kl_top_k = (p.gather(1, top) * top_log_ratio).sum(dim=1)
    # The rest is summed, not 1 less the top: what is left may be far below float32's step at 1.
    tiny = torch.finfo(torch.float32).tiny
    p_rest, q_rest = (x.scatter_(1, top, 0).sum(dim=1).clamp_min(tiny) for x in (p, q))
    kl_top_k += p_rest * (p_rest / q_rest).log()
    parts = (nll_reference, nll, kl, kl_top_k, jsd, agrees, flips)
    return torch.stack([part.double().sum() for part in parts])
