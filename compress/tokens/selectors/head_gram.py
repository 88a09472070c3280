"""How the heads of one token's query differ from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import BadInput
from compress.tokens.selectors.ranking import check_finite

if TYPE_CHECKING:
    import torch


def head_gram(query: torch.Tensor, *, double: bool = False) -> torch.Tensor:
    """Of each token the Gram matrix of its heads less their mean, the smaller one.

    ``query`` [n, heads, d] gives float32 [n, r, r], or float64, with r = min(heads, d): ``Z Z^T``
    between heads or ``Z^T Z`` between features, which have the same eigenvalues but for zeros. A
    rotation of all heads by the same angles (RoPE) cancels in ``Z Z^T`` and leaves the eigenvalues
    alone, so queries before rotation serve as well as those after it. Raises `BadInput` for a
    single head, which differs from nothing, and for values that are not finite.
    """
    heads, d = query.shape[1:]
    if heads < 2:
        raise BadInput(
            "queries of a single head have no entropy",
            got=heads,
            expected="2 heads or more",
            mend="choose a selector that looks at hidden states, such as logdet",
        )
    z = query.double() if double else query.float()
    z = z - z.mean(dim=1, keepdim=True)
    gram = z @ z.mT if heads <= d else z.mT @ z
    check_finite(gram, "queries of tokens")
    return gram


def trace(gram: torch.Tensor) -> torch.Tensor:
    """Of [n, r, r], the traces [n]: how much energy a token's heads have beside their mean."""
    return gram.diagonal(dim1=1, dim2=2).sum(dim=1)


def to_trace_one(gram: torch.Tensor) -> torch.Tensor:
    """Each matrix divided by its trace; zeros stay zero."""
    total = trace(gram)
    return gram / total.where(total > 0, 1)[:, None, None]
