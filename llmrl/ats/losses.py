"""Proper losses of a per-token temperature, as functions of the lse curve.

With L = log sum_i exp(s (z_i - m)) and the gap g = m - z_y (see `llmrl_kernels.lse_curve`), no logits are needed:

    NLL of the target            -log p_y   = L + s g
    confidence of the top token   log p_top = -L
    top-label log loss (TLL)      -[c log p_top + (1 - c) log(1 - p_top)],   c = 1 where the top token is the target

NLL scores the whole distribution, TLL the one number that a calibration plot shows. Both are proper: their expectation is
least where the probabilities are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSSES = ("nll", "top_label", "nll+top_label")
_SMALLEST = 1e-7  # of 1 - p_top: float32 cannot tell a smaller one from 0


def nll(lse: Tensor, log_scale: Tensor, gap: Tensor) -> Tensor:
    """Return -log p_y, `[N]` nats."""
    return lse + log_scale.exp() * gap


def top_label_log_loss(lse: Tensor, correct: Tensor) -> Tensor:
    """Return the binary log loss of "the most likely token is right", `[N]` nats."""
    wrong = -torch.expm1(-lse.clamp_min(0.0))  # 1 - p_top without cancellation
    return torch.where(correct, lse, -wrong.clamp_min(_SMALLEST).log())


def calibration_loss(name: str, lse: Tensor, log_scale: Tensor, gap: Tensor, correct: Tensor) -> Tensor:
    """Return the per-token loss `name` of LOSSES."""
    if name == "nll":
        return nll(lse, log_scale, gap)
    if name == "top_label":
        return top_label_log_loss(lse, correct)
    if name == "nll+top_label":
        return nll(lse, log_scale, gap) + top_label_log_loss(lse, correct)
    raise ValueError(f"unknown loss {name!r}; valid: {', '.join(LOSSES)}")
