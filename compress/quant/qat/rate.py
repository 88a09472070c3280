"""The codes' rate as something that training can lower.

An entropy coder charges ``-log2(frequency)`` bits for a code. With the frequencies as they are, a
weight between two codes is charged in proportion between their prices, so that its gradient is the
difference of them: the same as that of the entropy of a histogram to which each weight adds to its
two neighbours. Entropy-constrained quantization alternates alike between prices and codes (Chou,
Lookabaugh, Gray, IEEE Trans. ASSP 37(1), 1989). Imports torch.
"""

from __future__ import annotations

import torch


def code_rate(ratio: torch.Tensor, limit: int) -> torch.Tensor:
    """Bits per weight, for weights in steps, of any shape; codes are -limit to limit.

    For integers it is the entropy of the codes. Weights beyond the codes have no gradient. Prices
    are as noisy as counts are: it takes some hundred weights a code that occurs.
    """
    inside = ratio.clamp(-limit, limit).flatten()
    fixed = inside.detach()
    counts = torch.bincount((fixed.round() + limit).long(), minlength=2 * limit + 1)
    prices = counts.sum().log2() - counts.clamp(min=1).log2()
    below = fixed.floor().clamp_(max=limit - 1)
    place = (below + limit).long()
    return torch.lerp(prices[place], prices[place + 1], inside - below).mean()
