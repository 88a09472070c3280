"""Quantization: weight matrices as codes and scales, with the rate as the knob."""

from __future__ import annotations

from compress.quant.allocation import Curve, allocate, measure_curve
from compress.quant.ecsq import SCHEME, quantize_ecsq
from compress.quant.export import export_quantized, layer_name
from compress.quant.export_proof import prove_export
from compress.quant.fitting import Allocation, fit_rate
from compress.quant.layers import Linears, linear_names
from compress.quant.qtensor import QTensor, Scheme
from compress.quant.rate import Rate, sqnr
from compress.quant.rtn import fitting_group, quantize_rtn
from compress.quant.super_weights import super_weights

__all__ = [
    "SCHEME",
    "Allocation",
    "Curve",
    "Linears",
    "QTensor",
    "Rate",
    "Scheme",
    "allocate",
    "export_quantized",
    "fit_rate",
    "fitting_group",
    "layer_name",
    "linear_names",
    "measure_curve",
    "prove_export",
    "quantize_ecsq",
    "quantize_rtn",
    "sqnr",
    "super_weights",
]
