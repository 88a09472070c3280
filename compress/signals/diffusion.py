"""How many regions a walk from token to token tells apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.signals.renyi import median_kernel

if TYPE_CHECKING:
    import torch


def diffusion_entropy(x: torch.Tensor, t: float = 1) -> float:
    """Diffusion spectral entropy in nats of the tokens ``x``, float [tokens, d] (arXiv 2312.04823).

    The entropy of the shares ``|l|^t / sum |l|^t`` of the eigenvalues ``l`` of the random walk
    ``D^-1 K``, ``D`` the row sums of ``K``; the longer the walk of ``t`` steps, the fewer small
    eigenvalues count. ``K`` is the `median_kernel`, so the entropy does not change when ``x`` is
    scaled; the authors' fixed width of 10 would need hidden states of one scale. Between 0 and
    ``ln N``.
    """
    import torch

    kernel = median_kernel(x)
    root = kernel.sum(dim=1).sqrt()
    # The symmetric matrix has the walk's eigenvalues.
    powers = torch.linalg.eigvalsh(kernel / (root * root[:, None])).abs().pow(t)
    return torch.special.entr(powers / powers.sum()).sum().item()
