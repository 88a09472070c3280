"""Signals: entropy estimators and baselines, and the one calibration pass that collects them."""

from __future__ import annotations

from compress.signals.blocks import block_input, find_blocks, run_base
from compress.signals.collector import check_length, check_tokens, collect
from compress.signals.matrix_entropy import matrix_entropy
from compress.signals.measurement import Measurement, load_float32, measure, summarize
from compress.signals.nuclear_norm import nuclear_norm
from compress.signals.table import SCORERS, BlockTable, protected_blocks
from compress.signals.text import load_text, windows
from compress.signals.weights import (
    WeightEntropy,
    count_tops,
    entropy_bits,
    exponent_counts,
    has_exponents,
    measure_weights,
    symbol_entropy,
)

__all__ = [
    "SCORERS",
    "BlockTable",
    "Measurement",
    "WeightEntropy",
    "block_input",
    "check_length",
    "check_tokens",
    "collect",
    "count_tops",
    "entropy_bits",
    "exponent_counts",
    "find_blocks",
    "has_exponents",
    "load_float32",
    "load_text",
    "matrix_entropy",
    "measure",
    "measure_weights",
    "nuclear_norm",
    "protected_blocks",
    "run_base",
    "summarize",
    "symbol_entropy",
    "windows",
]
