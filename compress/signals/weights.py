"""How many bits a tensor's exponents really carry: what lossless coding can gain at most."""

from __future__ import annotations

from dataclasses import dataclass

from compress import codec
from compress.checkpoint import Checkpoint, TensorInfo
from compress.progress import SILENT, Progress

# By dtype: unsigned words of the same width, how far the exponent is from the right, its mask.
_EXPONENTS = {
    "BF16": ("<u2", 7, 0xFF),
    "F16": ("<u2", 10, 0x1F),
    "F32": ("<u4", 23, 0xFF),
    "F64": ("<u8", 52, 0x7FF),
    "F8_E4M3": ("<u1", 3, 0xF),
    "F8_E5M2": ("<u1", 2, 0x1F),
}
_BYTES = ("<u1", 0, 0xFF)
_PART = 1 << 20  # words whose exponents are held as integers at a time


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


def symbol_entropy(checkpoint: Checkpoint, info: TensorInfo) -> float:
    """Shannon entropy in bits of a tensor's exponent fields, or of its bytes; 0 if it is empty."""
    import numpy as np

    word, shift, mask = _EXPONENTS.get(info.dtype, _BYTES)
    counts = np.zeros(mask + 1, np.int64)
    rest = b""  # a chunk may end inside a word
    for chunk in checkpoint.chunks(info.name):
        data = np.frombuffer(rest + bytes(chunk) if rest else chunk, np.uint8)
        whole = len(data) - len(data) % np.dtype(word).itemsize
        rest = data[whole:].tobytes()
        words = data[:whole].view(word)
        for start in range(0, len(words), _PART):
            symbols = (words[start : start + _PART] >> shift) & mask
            counts += np.bincount(symbols.astype(np.int64), minlength=mask + 1)
    shares = counts[counts > 0] / max(1, counts.sum())
    return abs(float((shares * np.log2(shares)).sum()))
