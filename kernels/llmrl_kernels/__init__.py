"""Kernels and fused operations of llmrl: one file an operation, its plain torch reference beside it."""

from llmrl_kernels.lse_curve import curve_knots, lse_curve, lse_curve_reference, lse_interpolate
from llmrl_kernels.scaled_lse_sweep import LseSweep, scaled_lse_sweep, scaled_lse_sweep_reference

__all__ = [
    "LseSweep",
    "curve_knots",
    "lse_curve",
    "lse_curve_reference",
    "lse_interpolate",
    "scaled_lse_sweep",
    "scaled_lse_sweep_reference",
]
