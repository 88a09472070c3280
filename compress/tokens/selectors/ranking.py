"""What all selectors share: counts that can be kept, the best k, k evenly spaced, unit rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import BadInput

if TYPE_CHECKING:
    import torch


def check_count(k: int, n: int) -> None:
    """Raise `BadInput` unless ``k`` of ``n`` tokens can be kept."""
    if not 1 <= k <= n:
        raise BadInput("so many tokens cannot be kept", got=k, expected=f"1 to {n}")


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise `BadInput` if any of the values is NaN or infinite."""
    if not values.isfinite().all():
        raise BadInput(
            f"{what} are not finite, so no token can be preferred",
            mend="look for an overflow in the model: float16 ends at 65504",
        )


def top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` tokens with the highest ``scores``, float [n]: int64 [k], ascending.

    Of equal ones the first. Raises `BadInput` as `check_count` and `check_finite`.
    """
    import torch

    check_count(k, len(scores))
    check_finite(scores, "scores of tokens")
    return torch.sort(scores, descending=True, stable=True).indices[:k].sort().values


def evenly(n: int, k: int, device: torch.device) -> torch.Tensor:
    """The middles of ``k`` equal parts of ``n`` tokens: int64 [k], ascending."""
    import torch

    return (2 * torch.arange(k, device=device) + 1) * n // (2 * k)


def unit_rows(hidden: torch.Tensor) -> torch.Tensor:
    """Rows of length 1 in float32, zero rows as they are; `BadInput` if not finite."""
    import torch

    x = hidden.float()
    lengths = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    check_finite(lengths, "hidden states of tokens")
    return x / lengths.where(lengths > 0, 1)
