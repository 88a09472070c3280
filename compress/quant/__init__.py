"""Quantization: weight matrices as codes and scales, with the rate as the knob."""

from __future__ import annotations

from compress.quant.activations import fake_quant_tokens, quantized_inputs
from compress.quant.allocation import Curve, allocate, measure_curve
from compress.quant.bnb import export_bnb
from compress.quant.bnb_parts import Kind as BnbKind
from compress.quant.bnb_parts import bnb_rate, bnb_unfit
from compress.quant.bnb_proof import prove_bnb
from compress.quant.crossquant import Kernel, kernel_fractions
from compress.quant.ecsq import SCHEME, quantize_ecsq
from compress.quant.export import export_quantized, layer_name
from compress.quant.export_proof import prove_export
from compress.quant.fisher import measure_fisher, row_steps
from compress.quant.fitting import Allocation, fit_rate
from compress.quant.fold import Fold, plan_fold
from compress.quant.layers import ELSEWHERE, Linears, linear_names
from compress.quant.levels_search import Levels, LevelSearch, search_levels
from compress.quant.moments import Moments, measure_moments
from compress.quant.perplexity_rate import RateFound, rate_for_perplexity
from compress.quant.qat import (
    QatSettings,
    ScaleDtype,
    TokenBits,
    Trained,
    block_entropies,
    entropy_windows,
    train_blockwise,
    train_full,
    uniform_windows,
)
from compress.quant.qtensor import QTensor, Scheme
from compress.quant.rate import Rate, sqnr
from compress.quant.rtn import fitting_group, quantize_rtn
from compress.quant.super_weights import super_weights

__all__ = [
    "ELSEWHERE",
    "SCHEME",
    "Allocation",
    "BnbKind",
    "Curve",
    "Fold",
    "Kernel",
    "LevelSearch",
    "Levels",
    "Linears",
    "Moments",
    "QTensor",
    "QatSettings",
    "Rate",
    "RateFound",
    "ScaleDtype",
    "Scheme",
    "TokenBits",
    "Trained",
    "allocate",
    "block_entropies",
    "bnb_rate",
    "bnb_unfit",
    "entropy_windows",
    "export_bnb",
    "export_quantized",
    "fake_quant_tokens",
    "fit_rate",
    "fitting_group",
    "kernel_fractions",
    "layer_name",
    "linear_names",
    "measure_curve",
    "measure_fisher",
    "measure_moments",
    "plan_fold",
    "prove_bnb",
    "prove_export",
    "quantize_ecsq",
    "quantize_rtn",
    "quantized_inputs",
    "rate_for_perplexity",
    "row_steps",
    "search_levels",
    "sqnr",
    "super_weights",
    "train_blockwise",
    "train_full",
    "uniform_windows",
]
