"""What a quantized matrix costs, as the codec stores it, and what is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress import codec

if TYPE_CHECKING:
    import torch

    from compress.quant.qtensor import QTensor


@dataclass(frozen=True)
class Rate:
    """Bits that ``weights`` weights take: their codes, scales and zero points."""

    weights: int = 0
    codes: int = 0
    scales: int = 0
    zeros: int = 0

    @property
    def bits(self) -> int:
        return self.codes + self.scales + self.zeros

    @property
    def bits_per_weight(self) -> float:
        """0 where there are no weights."""
        return self.bits / max(1, self.weights)

    def __add__(self, other: Rate) -> Rate:
        return Rate(
            self.weights + other.weights,
            self.codes + other.codes,
            self.scales + other.scales,
            self.zeros + other.zeros,
        )


def measure_rate(quantized: QTensor) -> Rate:
    """The codes' length as one int8 tensor that `compress.codec` has coded, to the bit.

    Header, tables, directory and checksums count: at most 0.006 bits a weight for a million of them
    and more, beside the length-limited Huffman code of the whole matrix, which tables of their own
    for parts of it often beat. Scales and zero points count in full width, as a dense checkpoint
    stores them.
    """
    import torch

    codes, scale, zero = quantized.codes, quantized.scale, quantized.zero
    data = codes.contiguous().view(torch.uint8).flatten().cpu().numpy()
    return Rate(
        codes.numel(),
        8 * codec.predict("I8", [data], tuple(codes.shape)),
        scale.numel() * scale.element_size() * 8,
        0 if zero is None else zero.numel() * quantized.scheme.bits,
    )


def count_codes(codes: torch.Tensor) -> torch.Tensor:
    """How often each code occurs, int64 [256]; a negative code stands at 256 + code."""
    import torch

    return torch.bincount(codes.contiguous().view(torch.uint8).flatten(), minlength=256)


def sqnr(w: torch.Tensor, quantized: QTensor) -> float:
    """Signal to quantization noise in dB of a float matrix [rows, columns]; inf if none is lost."""
    import math

    import torch

    signal = noise = 0.0
    dense = quantized.dense(torch.float32)
    for part, approximation in zip(w.split(1024), dense.split(1024), strict=True):
        wide = part.double()
        signal += float(wide.square().sum())
        noise += float((wide - approximation).square().sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
