"""Signals: entropy estimators and baselines, and the one calibration pass that collects them."""

from __future__ import annotations

from compress.signals.blocks import find_blocks
from compress.signals.collector import check_length, check_tokens, collect
from compress.signals.measurement import Measurement, load_float32, measure, summarize
from compress.signals.table import SCORERS, BlockTable, protected_blocks
from compress.signals.weights import WeightEntropy, measure_weights, symbol_entropy

__all__ = [
    "SCORERS",
    "BlockTable",
    "Measurement",
    "WeightEntropy",
    "check_length",
    "check_tokens",
    "collect",
    "find_blocks",
    "load_float32",
    "measure",
    "measure_weights",
    "protected_blocks",
    "summarize",
    "symbol_entropy",
]
