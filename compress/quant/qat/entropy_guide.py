"""The entropy guide: queries and keys keep their spread.

EdgeQAT (arXiv 2402.10787) takes queries and keys for Gaussian, whose entropy grows with their
variance, and maximizes it (equation 12). That inflates what quantization had not changed, and
drives attention away from the teacher's. What was lost is the teacher's entropy, so by default the
logarithms of the variances, twice the entropies, are to match. Imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.quant.qat.attention import Attention


def match_variances(student: Sequence[Attention], teacher: Sequence[Attention]) -> torch.Tensor:
    """Mean of ``(log var_student - log var_teacher)^2`` over blocks, queries and keys, and heads.

    The variance is that of a head's numbers over sequences, tokens and dimensions.
    """
    gaps = [
        (_variances(own).log() - _variances(other).log()).square()
        for mine, theirs in zip(student, teacher, strict=True)
        for own, other in ((mine.queries, theirs.queries), (mine.keys, theirs.keys))
    ]
    return torch.cat(gaps).mean()


def maximize_entropy(student: Sequence[Attention]) -> torch.Tensor:
    """Equation 12 as printed: ``-log(sum over blocks, heads of log(1 + var_q * var_k))``.

    A head of keys counts once for every head of queries that it serves.
    """
    found = []
    for seen in student:
        of_queries, of_keys = _variances(seen.queries), _variances(seen.keys)
        of_keys = of_keys.repeat_interleave(len(of_queries) // len(of_keys))
        found.append(torch.log1p(of_queries * of_keys))
    return -torch.cat(found).sum().log()


def _variances(states: torch.Tensor) -> torch.Tensor:
    """Of states [batch, heads, tokens, d], [heads]."""
    variance = states.float().transpose(0, 1).flatten(1).var(1, correction=0)
    return variance.clamp(min=torch.finfo(torch.float32).tiny)
