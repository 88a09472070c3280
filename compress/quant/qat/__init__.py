"""Training of weights that will be quantized, and of their steps (EdgeQAT, arXiv 2402.10787)."""

from __future__ import annotations

from compress.quant.qat.blockwise import train_blockwise
from compress.quant.qat.full import train_full
from compress.quant.qat.settings import QatSettings
from compress.quant.qat.token_bits import TokenBits
from compress.quant.qat.trained import Trained

__all__ = ["QatSettings", "TokenBits", "Trained", "train_blockwise", "train_full"]
