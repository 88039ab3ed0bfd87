"""Preference losses of LeReT: IPO with summed or averaged log-ratios, and DPO.

With h = log p(chosen)/p_ref(chosen) - log p(rejected)/p_ref(rejected), each the sum over the tokens of a query:

    IPO, sum    (h - 1 / (2 beta))^2                        LeReT's code (arXiv 2410.23214); eq. 17 of arXiv 2310.12036
    IPO, mean   the same with each log-ratio over its own number of tokens: trl's `loss_type="ipo"`
    DPO         -log sigmoid(beta h)                        eq. 7 of arXiv 2305.18290

The two IPOs ask for different things at the same beta: 0.05 is a gap of 10 nats for the query, or of 10 nats a token.
`implied_margin` says which.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from llmrl.errors import UsageError, did_you_mean

REDUCTIONS = ("sum", "mean")
IGNORED = -100


class SequenceLogps(NamedTuple):
    """`total` `[B]`: sum of the log-probabilities of the labelled tokens, in nats; `length` `[B]`: how many they are."""

    total: Tensor
    length: Tensor


class LogRatios(NamedTuple):
    """Log-ratios of policy to reference, `[B]` each, summed over tokens, with the tokens of each sequence."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def difference(self) -> Tensor:
        """h `[B]`: how much more than the reference the policy prefers the chosen."""
        return self.chosen - self.rejected


class Margin(NamedTuple):
    """The gap of log-ratios at which IPO's loss is least, in nats: of a whole query, and a token of it."""

    total: float
    per_token: float


def sequence_logps(logits: Tensor, labels: Tensor) -> SequenceLogps:
    """Return the log-probability of each sequence's labelled tokens.

    Args:
        logits: `[B, T, V]`, where position t predicts token t + 1.
        labels: `[B, T]`, the token ids themselves (not shifted), -100 where a token does not count. The first token is
            predicted by nothing and never counts.
    """
    return aligned_logps(logits[:, :-1], labels[:, 1:])


def aligned_logps(logits: Tensor, targets: Tensor) -> SequenceLogps:
    """Return the same from logits `[B, T, V]` that predict `targets` `[B, T]` at their own position."""
    # in float32 also where the model computes in bfloat16: at 8 bits a sum of thirty terms would drown the difference
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    per_token = -functional.cross_entropy(precise.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return SequenceLogps(per_token.sum(1), (targets != IGNORED).sum(1))


def log_ratios(chosen: SequenceLogps, rejected: SequenceLogps, ref_chosen: Tensor, ref_rejected: Tensor) -> LogRatios:
    """Return the log-ratios of the policy's sequences against the reference's totals, `[B]` each."""
    return LogRatios(chosen.total - ref_chosen, rejected.total - ref_rejected, chosen.length, rejected.length)


def ipo_loss(ratios: LogRatios, beta: float, reduction: str = "sum") -> Tensor:
    """Return `[B]` losses, whose mean is the batch's.

    Args:
        ratios: of the batch.
        beta: tau of the IPO paper, above 0.
        reduction: one of REDUCTIONS.

    Raises:
        UsageError: beta is not positive, or the reduction is unknown.
    """
    _check(beta, reduction)
    if reduction == "sum":
        return (ratios.difference - 1 / (2 * beta)).square()
    chosen = ratios.chosen / ratios.chosen_length.clamp_min(1)
    rejected = ratios.rejected / ratios.rejected_length.clamp_min(1)
    return (chosen - rejected - 1 / (2 * beta)).square()


def dpo_loss(ratios: LogRatios, beta: float) -> Tensor:
    """Return `[B]` losses of DPO (sigmoid).

    Raises:
        UsageError: beta is not positive.
    """
    _check(beta, "sum")
    return -functional.logsigmoid(beta * ratios.difference)


def implied_margin(beta: float, reduction: str, mean_length: float) -> Margin:
    """Return what IPO asks for at queries of `mean_length` tokens.

    0.05 with "sum" is 10 nats a query, at 15 tokens 0.67 a token, the same as "mean" with 0.75.

    Raises:
        UsageError: beta or the length is not positive, or the reduction is unknown.
    """
    _check(beta, reduction)
    if not mean_length > 0:
        raise UsageError(f"the mean length of the queries must be above 0, got {mean_length}")
    asked = 1 / (2 * beta)
    if reduction == "sum":
        return Margin(asked, asked / mean_length)
    return Margin(asked * mean_length, asked)


def preference_metrics(ratios: LogRatios) -> dict[str, float]:
    """Return means over the batch: accuracy (ties count half), the margin in nats and a token, and both log-ratios."""
    gap = ratios.difference.detach()
    per_token = ratios.chosen / ratios.chosen_length.clamp_min(1) - ratios.rejected / ratios.rejected_length.clamp_min(
        1
    )
    values = {
        "accuracy": (gap > 0).float() + 0.5 * (gap == 0).float(),
        "margin": gap,
        "margin_per_token": per_token,
        "log_ratio_chosen": ratios.chosen,
        "log_ratio_rejected": ratios.rejected,
    }
    return {name: value.detach().float().mean().item() for name, value in values.items()}


def _check(beta: float, reduction: str) -> None:
    if not beta > 0:
        raise UsageError(f"beta must be above 0, got {beta}")
    if reduction not in REDUCTIONS:
        raise UsageError(f"unknown ipo_reduction '{reduction}'{did_you_mean(reduction, REDUCTIONS)}")
