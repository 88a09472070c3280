"""Signals: entropy estimators and baselines, and the one calibration pass that collects them."""

from __future__ import annotations

from compress.signals.angular import angular_distance
from compress.signals.attention_entropy import attention_entropy
from compress.signals.blocks import block_input, block_output, find_blocks, run_base
from compress.signals.collector import (
    Part,
    check_length,
    check_scorers,
    check_tokens,
    collect,
    one_thread_each,
)
from compress.signals.diffusion import diffusion_entropy
from compress.signals.effective_rank import effective_rank
from compress.signals.gaussian import gaussian_entropy
from compress.signals.matrix_entropy import matrix_entropy
from compress.signals.measurement import Measurement, load_float32, measure, summarize
from compress.signals.nuclear_norm import nuclear_norm
from compress.signals.pq_index import pq_index
from compress.signals.prediction import next_token_entropy
from compress.signals.renyi import renyi_kernel_entropy, renyi_matrix_entropy
from compress.signals.sinks import massive_tokens, ordinary_tokens
from compress.signals.table import (
    SCORERS,
    SCORERS_DEFAULT,
    BlockTable,
    Stability,
    protected_blocks,
    significant,
)
from compress.signals.text import load_text, windows
from compress.signals.truncated import truncated_matrix_entropy
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
    "SCORERS_DEFAULT",
    "BlockTable",
    "Measurement",
    "Part",
    "Stability",
    "WeightEntropy",
    "angular_distance",
    "attention_entropy",
    "block_input",
    "block_output",
    "check_length",
    "check_scorers",
    "check_tokens",
    "collect",
    "count_tops",
    "diffusion_entropy",
    "effective_rank",
    "entropy_bits",
    "exponent_counts",
    "find_blocks",
    "gaussian_entropy",
    "has_exponents",
    "load_float32",
    "load_text",
    "massive_tokens",
    "matrix_entropy",
    "measure",
    "measure_weights",
    "next_token_entropy",
    "nuclear_norm",
    "one_thread_each",
    "ordinary_tokens",
    "pq_index",
    "protected_blocks",
    "renyi_kernel_entropy",
    "renyi_matrix_entropy",
    "run_base",
    "significant",
    "summarize",
    "symbol_entropy",
    "truncated_matrix_entropy",
    "windows",
]
