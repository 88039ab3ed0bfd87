"""Kernels and fused operations of llmrl: one file an operation, its plain torch reference beside it."""

from llmrl_kernels.lse_curve import curve_knots, lse_curve, lse_curve_reference, lse_interpolate
from llmrl_kernels.merge_all import MergeItem, MergePlan, merge_all_reference, merge_snr, subtract_and_add
from llmrl_kernels.routed_gathered import (
    routed_expand_gathered,
    routed_expand_gathered_reference,
    routed_lora_gathered,
    routed_shrink_gathered,
    routed_shrink_gathered_reference,
)
from llmrl_kernels.routed_lora import (
    routed_expand,
    routed_expand_reference,
    routed_lora,
    routed_lora_reference,
    routed_shrink,
    routed_shrink_reference,
)
from llmrl_kernels.scaled_lse_sweep import LseSweep, scaled_lse_sweep, scaled_lse_sweep_reference
from llmrl_kernels.switch_linear import SwitchWorkspace, switch_linear, switch_linear_reference
from llmrl_kernels.tuning import block_sizes

__all__ = [
    "LseSweep",
    "MergeItem",
    "MergePlan",
    "SwitchWorkspace",
    "block_sizes",
    "curve_knots",
    "lse_curve",
    "lse_curve_reference",
    "lse_interpolate",
    "merge_all_reference",
    "merge_snr",
    "routed_expand",
    "routed_expand_gathered",
    "routed_expand_gathered_reference",
    "routed_expand_reference",
    "routed_lora",
    "routed_lora_gathered",
    "routed_lora_reference",
    "routed_shrink",
    "routed_shrink_gathered",
    "routed_shrink_gathered_reference",
    "routed_shrink_reference",
    "scaled_lse_sweep",
    "scaled_lse_sweep_reference",
    "subtract_and_add",
    "switch_linear",
    "switch_linear_reference",
]
