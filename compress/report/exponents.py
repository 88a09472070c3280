"""How often each exponent occurs: in one pass, the entropies and the codec's view of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress import codec
from compress.checkpoint import Checkpoint, TensorInfo
from compress.progress import SILENT, Progress
from compress.signals import count_tops, entropy_bits, exponent_counts, has_exponents

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class TensorExponents:
    """A tensor's exponents. ``bits``: their order-0 entropy; ``coded``: counts of the byte that
    holds them in the codec, 256 of them: after the sign was rotated away where the codec does so.
    """

    name: str
    dtype: str
    weights: int
    bits: float
    coded: np.ndarray


@dataclass(frozen=True)
class Histogram:
    """The bytes that hold the exponents of all tensors of one dtype, and a Huffman code for them.

    ``lengths``: canonical code lengths in bits, 0 for a byte that does not occur; ``entropy`` and
    ``mean_length``: bits per weight. A file's own codes are chosen anew every so many words.
    """

    dtype: str
    counts: list[int]
    lengths: list[int]
    entropy: float
    mean_length: float


def measure_exponents(checkpoint: Checkpoint, progress: Progress = SILENT) -> list[TensorExponents]:
    """Every tensor that has exponents; the others are not read. Raises as `Checkpoint.chunks`."""
    infos = [info for info in checkpoint.tensor_infos().values() if has_exponents(info.dtype)]
    found = []
    with progress.step("reading exponents", sum(info.nbytes for info in infos)) as step:
        for info in infos:
            found.append(_measure(checkpoint, info))
            step.advance(info.nbytes)
    return found


def pool(tensors: Iterable[TensorExponents]) -> Histogram | None:
    """The histogram of the dtype that most weights have; None where no two bytes differ."""
    import numpy as np

    weights: dict[str, int] = {}
    tensors = list(tensors)
    for tensor in tensors:
        weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.weights
    if not weights:
        return None
    dtype = max(sorted(weights), key=weights.__getitem__)
    counts = np.sum([tensor.coded for tensor in tensors if tensor.dtype == dtype], axis=0)
    if (counts > 0).sum() < 2:
        return None
    lengths = codec.code_lengths(counts.tolist())
    mean = float(counts @ lengths) / float(counts.sum())
    return Histogram(dtype, counts.tolist(), list(lengths), entropy_bits(counts), mean)


def _measure(checkpoint: Checkpoint, info: TensorInfo) -> TensorExponents:
    import numpy as np

    tops = count_tops(checkpoint, info)
    values = np.arange(len(tops))
    coded = np.bincount(values if len(tops) == 256 else (values >> 7) & 0xFF, tops, 256)
    weights = info.nbytes * 8 // codec.dtype_bits(info.dtype)
    bits = entropy_bits(exponent_counts(tops, info.dtype))
    return TensorExponents(info.name, info.dtype, weights, bits, coded.astype(np.int64))
