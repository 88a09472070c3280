"""Keep the set of tokens with the most entropy as a set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.tokens.selectors.ranking import check_count, unit_rows

if TYPE_CHECKING:
    import torch

    from compress.tokens.segment import Segment


@dataclass(frozen=True)
class LogDet:
    """``k`` tokens ``S`` that together have a large ``log det(I + a K_S)``, chosen greedily.

    ``K``: cosines between the hidden states that enter layer K, not centred: centred, noise looks
    diverse. ``log det`` is the entropy of a Gaussian with that covariance; it is submodular, so the
    greedy choice has at least 1 - 1/e of the most possible (Nemhauser et al. 1978). The updates are
    those of fast greedy MAP inference for DPPs (arXiv 1709.05135). A token counts for less the
    nearer it is to what is chosen already, which scores of single tokens cannot see. The first is
    the segment's first, for alone all are worth the same. Takes 4 n^2 bytes for n tokens.

    ``alpha``: ``a``, above 0; the larger, the less a token like a chosen one is worth.
    ``relevance``: weigh tokens by likeness to the text, ``K_ij r_i r_j`` (CDPruner, arXiv
    2506.10967), ``r`` from 0 to 1; kept tokens then depend on the prompt.
    """

    alpha: float = 10.0
    relevance: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise BadInput(
                "out of range", where="logdet, alpha", got=self.alpha, expected="more than 0"
            )

    def __call__(self, segment: Segment, k: int) -> torch.Tensor:
        check_count(k, len(segment.hidden))
        x = unit_rows(segment.hidden)
        kernel = x @ x.T
        # Exactly 1, or 0: of tokens worth the same the first goes in, not what rounding says.
        kernel.diagonal().round_()
        if self.relevance:
            relevance = _relevance(x, segment.text)
            kernel *= relevance[:, None] * relevance
        return _greedy(self.alpha * kernel, k)


def _relevance(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Mean cosine of the unit rows ``x`` [n, D] with the text's [m, D], stretched to 0 to 1.

    1 for all where they do not differ.
    """
    if not len(text):
        raise BadInput(
            "there is no text to be relevant to",
            where="logdet, relevance",
            mend="switch it off, or prompt with more than the image",
        )
    likeness = x @ unit_rows(text).mean(dim=0)
    least, most = likeness.aminmax()
    return ((likeness - least) / (most - least)).where(most > least, 1)


def _greedy(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy maximum of ``log det(I + kernel_S)`` over sets ``S`` of ``k``: int64 [k], ascending.

    No step waits for the device: everything stays in tensors.
    """
    import torch

    n = len(kernel)
    rows = kernel.new_empty(k, n)  # of the Cholesky factor of I + kernel, in the order chosen
    chosen = torch.empty(k, dtype=torch.long, device=kernel.device)
    # Adding a token multiplies the determinant by its variance given those chosen, 1 at least.
    variance = kernel.diagonal() + 1
    for step in range(k):
        best = variance.argmax(dim=0, keepdim=True)
        chosen[step : step + 1] = best
        row = kernel.index_select(0, best)[0]
        row = row - rows[:step].index_select(1, best)[:, 0] @ rows[:step]
        rows[step] = row / variance.index_select(0, best).sqrt()
        variance = variance - rows[step].square()
        variance.index_fill_(0, best, -math.inf)
    return chosen.sort().values
