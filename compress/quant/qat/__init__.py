"""Training of weights that will be quantized, and of their steps (EdgeQAT, arXiv 2402.10787)."""

from __future__ import annotations

from compress.quant.qat.blockwise import train_blockwise
from compress.quant.qat.full import train_full
from compress.quant.qat.partition import block_entropies, entropy_windows, uniform_windows
from compress.quant.qat.settings import QatSettings, ScaleDtype
from compress.quant.qat.token_bits import TokenBits
from compress.quant.qat.trained import Trained

__all__ = [
    "QatSettings",
    "ScaleDtype",
    "TokenBits",
    "Trained",
    "block_entropies",
    "entropy_windows",
    "train_blockwise",
    "train_full",
    "uniform_windows",
]
