"""EntroDrop's own scores, to compare with: they see every token of a sequence, sinks included.

"Entropy-Based Block Pruning for Efficient Large Language Models", arXiv 2504.03794, with the
constants of its code, SalesforceAIResearch/EntroDrop at commit 97e5009. A score is the entropy of
the output less that of the input, in nats, per sequence, and the mean over sequences. The lowest
goes first, whether or not it writes a sink; the first two and the last stay (`BlockTable.order`).
The code scores attention, by ``entrodrop_knn``, on 128 sequences of 256 tokens of C4.

The formulas are those of `knn_entropy`, `bucket_entropy` and `renyi_kernel_entropy`, which are not
shown the sinks. One sink leaves all other tokens in one bucket: the block that writes it, and must
stay, then seems the best to remove.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from compress.signals.bucket import bucket_entropy
from compress.signals.knn import knn_entropy
from compress.signals.renyi import renyi_kernel_entropy

if TYPE_CHECKING:
    import torch


def _knn(x: torch.Tensor) -> float:
    """In float64: a sink pulls the mean, from which distances are reckoned, far off the tokens."""
    return knn_entropy(x.double(), k=25)


# Written out: our own defaults may change, these must not.
ENTRODROP: dict[str, Callable[[torch.Tensor], float]] = {
    "entrodrop_knn": _knn,
    "entrodrop_bucket": partial(bucket_entropy, bins=20),
    "entrodrop_renyi": partial(renyi_kernel_entropy, alpha=4.0),
}
