"""Quantization: weight matrices as codes and scales, with the rate as the knob."""

from __future__ import annotations

from compress.quant.activations import fake_quant_tokens, quantized_inputs
from compress.quant.allocation import Curve, allocate, measure_curve
from compress.quant.crossquant import Kernel, kernel_fractions
from compress.quant.ecsq import SCHEME, quantize_ecsq
from compress.quant.export import export_quantized, layer_name
from compress.quant.export_proof import prove_export
from compress.quant.fitting import Allocation, fit_rate
from compress.quant.fold import Fold, plan_fold
from compress.quant.layers import Linears, linear_names
from compress.quant.moments import Moments, measure_moments
from compress.quant.qtensor import QTensor, Scheme
from compress.quant.rate import Rate, sqnr
from compress.quant.rtn import fitting_group, quantize_rtn
from compress.quant.super_weights import super_weights

__all__ = [
    "SCHEME",
    "Allocation",
    "Curve",
    "Fold",
    "Kernel",
    "Linears",
    "Moments",
    "QTensor",
    "Rate",
    "Scheme",
    "allocate",
    "export_quantized",
    "fake_quant_tokens",
    "fit_rate",
    "fitting_group",
    "kernel_fractions",
    "layer_name",
    "linear_names",
    "measure_curve",
    "measure_moments",
    "plan_fold",
    "prove_export",
    "quantize_ecsq",
    "quantize_rtn",
    "quantized_inputs",
    "sqnr",
    "super_weights",
]
