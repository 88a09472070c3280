"""What a student is to learn from its teacher: next tokens, or hidden states. Imports torch."""

from __future__ import annotations

import torch


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tokens: torch.Tensor,
    *,
    soft: float,
    temperature: float,
) -> torch.Tensor:
    """EdgeQAT (arXiv 2402.10787) equation 15, in nats: ``(1 - soft) CE + soft temperature^2 KL``.

    Logits [tokens, vocabulary] for ``tokens`` [tokens]. CE is the mean of -log p of each next
    token, KL that of ``KL(teacher || student)`` of both at that temperature.
    """
    hard = torch.nn.functional.cross_entropy(student[:-1], tokens[1:])
    log_p = (teacher / temperature).log_softmax(1)
    log_q = (student / temperature).log_softmax(1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    return (1 - soft) * hard + soft * temperature**2 * divergence


def hidden_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ``|student - teacher|^2 / |teacher|^2``; states [.., tokens, d].

    By token, as the massive states of a first token would drown all others in a common mean.
    """
    size = teacher.square().sum(-1).clamp(min=torch.finfo(teacher.dtype).tiny)
    return ((student - teacher).square().sum(-1) / size).mean()
