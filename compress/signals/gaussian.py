"""Differential entropy of a Gaussian fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def gaussian_entropy(x: torch.Tensor) -> float:
    """Entropy in nats of independent Gaussians fitted to the features of ``x``, [tokens, d].

    ``H = sum_j (1 / 2) ln(2 pi e var_j)``, ``var_j`` the variance over the tokens: the measure of
    "MLP Can Be A Good Transformer Learner" (arXiv 2404.05657), with its constant. An upper bound of
    the entropy for these variances. Scaling ``x`` by ``c`` adds ``d * ln c``. A variance below the
    smallest normal float32 counts as that, so that a feature which never changes stays finite.
    """
    import torch

    variances = x.double().var(dim=0, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    return (variances * (2 * math.pi * math.e)).log().sum().item() / 2
