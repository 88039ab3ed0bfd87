"""Kernels and fused operations of llmrl: one file an operation, its plain torch reference beside it."""

from llmrl_kernels.lse_curve import curve_knots, lse_curve, lse_curve_reference, lse_interpolate

__all__ = ["curve_knots", "lse_curve", "lse_curve_reference", "lse_interpolate"]
