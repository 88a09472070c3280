"""The distribution guide: attention goes where the teacher's goes.

EdgeQAT (arXiv 2402.10787) compares attention maps by their cosine. Equation 13 adds the logarithm
of the sum of cosines to a loss that is minimized, which drives the maps apart; its sign is
turned round here unless the paper is to be taken at its word. Maps are those after the softmax: of
raw scores the sum may be negative, and has no logarithm. Imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compress.quant.qat.attention import Attention


def match_attention(student: Sequence[Attention], teacher: Sequence[Attention]) -> torch.Tensor:
    """``-log`` of `attention_cosine`: 0 where all maps are alike."""
    return -attention_cosine(student, teacher).log()


def repel_attention(student: Sequence[Attention], teacher: Sequence[Attention]) -> torch.Tensor:
    """Equation 13 as printed: ``+log(sum over blocks and heads of the cosines)``."""
    return _cosines(student, teacher).sum(1).mean().log()


def attention_cosine(student: Sequence[Attention], teacher: Sequence[Attention]) -> torch.Tensor:
    """Mean over sequences, blocks and heads of the cosine of two maps, each taken as a vector."""
    return _cosines(student, teacher).mean()


def _cosines(student: Sequence[Attention], teacher: Sequence[Attention]) -> torch.Tensor:
    """[batch, blocks * heads]"""
    found = [
        torch.cosine_similarity(mine.maps.float().flatten(2), theirs.maps.float().flatten(2), dim=2)
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.cat(found, 1)
