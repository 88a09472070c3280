"""How many bits a tensor's exponents really carry: what lossless coding can gain at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress import codec
from compress.checkpoint import Checkpoint, TensorInfo
from compress.progress import SILENT, Progress

if TYPE_CHECKING:
    import numpy as np

# By dtype: the bytes of a word; in its highest 16 bits (8 of a one-byte word), how far the exponent
# is from the right, and its mask.
_EXPONENTS = {
    "BF16": (2, 7, 0xFF),
    "F16": (2, 10, 0x1F),
    "F32": (4, 7, 0xFF),
    "F64": (8, 4, 0x7FF),
    "F8_E4M3": (1, 3, 0xF),
    "F8_E5M2": (1, 2, 0x1F),
}
_BYTES = (1, 0, 0xFF)
_PART = 1 << 20  # words counted at a time: counting widens them to 8 bytes each


@dataclass(frozen=True)
class WeightEntropy:
    """A tensor of ``weights`` numbers and the order-0 Shannon entropy in bits of its symbols.

    ``symbol``: "exponent", or "byte" for a dtype that has none.
    """

    name: str
    dtype: str
    weights: int
    symbol: str
    bits: float


def measure_weights(checkpoint: Checkpoint, progress: Progress = SILENT) -> list[WeightEntropy]:
    """The entropy of every tensor of a checkpoint, coded or not, streamed in order."""
    infos = checkpoint.tensor_infos().values()
    found = []
    with progress.step("measuring", sum(info.nbytes for info in infos)) as step:
        for info in infos:
            symbol = "exponent" if info.dtype in _EXPONENTS else "byte"
            weights = info.nbytes * 8 // codec.dtype_bits(info.dtype)
            bits = symbol_entropy(checkpoint, info)
            found.append(WeightEntropy(info.name, info.dtype, weights, symbol, bits))
            step.advance(info.nbytes)
    return found


def has_exponents(dtype: str) -> bool:
    """Whether a dtype, as safetensors spells it, is one of those with exponents known here."""
    return dtype in _EXPONENTS


def symbol_entropy(checkpoint: Checkpoint, info: TensorInfo) -> float:
    """Shannon entropy in bits of a tensor's exponent fields, or of its bytes; 0 if it is empty."""
    return entropy_bits(exponent_counts(count_tops(checkpoint, info), info.dtype))


def count_tops(checkpoint: Checkpoint, info: TensorInfo) -> np.ndarray:
    """How often each value of the highest two bytes of a word occurs, int64 [65536].

    Of one-byte words, and of dtypes without exponents, each byte: [256]. Raises as
    `Checkpoint.chunks`.
    """
    import numpy as np

    width = _EXPONENTS.get(info.dtype, _BYTES)[0]
    size = min(2, width)
    counts = np.zeros(1 << 8 * size, np.int64)
    rest = b""  # a chunk may end inside a word
    for chunk in checkpoint.chunks(info.name):
        data = np.frombuffer(rest + bytes(chunk) if rest else chunk, np.uint8)
        whole = len(data) - len(data) % width
        rest = data[whole:].tobytes()
        tops = data[:whole].view(f"<u{size}")[width // size - 1 :: width // size]
        for start in range(0, len(tops), _PART):
            counts += np.bincount(tops[start : start + _PART], minlength=len(counts))
    return counts


def exponent_counts(tops: np.ndarray, dtype: str) -> np.ndarray:
    """How often each exponent occurs, from `count_tops`; each byte of a dtype without exponents."""
    import numpy as np

    _, shift, mask = _EXPONENTS.get(dtype, _BYTES)
    return np.bincount((np.arange(len(tops)) >> shift) & mask, tops, mask + 1)


def entropy_bits(counts: np.ndarray) -> float:
    """Order-0 Shannon entropy in bits of a symbol that occurs so often; 0 of nothing."""
    import numpy as np

    shares = counts[counts > 0] / max(1, counts.sum())
    return abs(float((shares * np.log2(shares)).sum()))
