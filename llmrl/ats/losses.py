"""Losses of a per-token temperature, as functions of the lse curve.

With s the multiplier of the logits z, m their maximum, L = log sum_i exp(s (z_i - m)) and gaps below the maximum (see
`llmrl_kernels.lse_curve`), no logits are needed:

    NLL of the target                 -log p_y      = L + s (m - z_y)
    confidence of the top token       -log p_top    = L
    mean over the vocabulary          -mean log p_i = L + s (m - mean z)

NLL scores the whole distribution; the top-label losses score the one number that a calibration plot shows. These are proper:
their expectation is least where the probabilities are right. Selective smoothing, the loss of the paper (arXiv 2409.19817,
sec. 3.2), is not: what it converges to depends on alpha and on the shape of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmrl.errors import UsageError, did_you_mean

REFERENCE = "smoothing-reference"
SMOOTHING = ("smoothing", REFERENCE, "smoothing-topk")
LOSSES = ("nll", "top_label", "nll+top_label", "top_label_brier", *SMOOTHING, "answer")
AGGREGATES = ("mean", "geometric_mean", "product", "min", "first", "last")
TOP_K = 5
_SMALLEST = 1e-7  # of 1 - confidence: float32 cannot tell a smaller one from 0


@dataclass(frozen=True)
class Loss:
    """Which loss, and the one number or word it may need.

    Args:
        name: one of LOSSES.
        alpha: of the smoothing losses, the weight of the wrong tokens, between 0 and 1.
        aggregate: of "answer", how the probabilities of its tokens become its confidence; one of AGGREGATES.
    """

    name: str
    alpha: float = 0.5
    aggregate: str = "mean"

    def __post_init__(self) -> None:
        for word, valid, what in ((self.name, LOSSES, "loss"), (self.aggregate, AGGREGATES, "answer confidence")):
            if word not in valid:
                raise UsageError(f"unknown {what} '{word}'{did_you_mean(word, valid)}")
        if not 0.0 < self.alpha < 1.0:
            raise UsageError(f"alpha of the smoothing loss must lie between 0 and 1, got {self.alpha}")

    @property
    def of_windows(self) -> bool:
        """Whether it is a loss of whole windows (an answer, a sequence), all of whose tokens must be there."""
        return self.name in ("answer", REFERENCE)


@dataclass(frozen=True)
class Tempered:
    """N tokens at their temperatures, each `[N]`: all that a loss reads.

    lse L(s) and scale s; gap, mean_gap and top_gap are m minus the target's logit, the mean logit, the mean of the TOP_K
    largest; confidence_gap is 0, or `gap` where the confidence is that of the token that was said. Read by losses of whole
    windows only: window numbers the windows (answers) 0, 1, ... in order; unscored `[W]` is how many tokens of each do not
    count.
    """

    lse: Tensor
    scale: Tensor
    gap: Tensor
    mean_gap: Tensor
    top_gap: Tensor
    confidence_gap: Tensor
    correct: Tensor
    window: Tensor
    unscored: Tensor


def calibration_loss(loss: Loss, at: Tempered) -> Tensor:
    """Return `[N]` values (`[W]` for a loss of whole windows) whose mean is the loss."""
    if loss.name == "answer":
        return answer_log_loss(-nll(at.lse, at.scale, at.gap), at.window, at.correct, loss.aggregate)
    if loss.name in SMOOTHING:
        spread = at.top_gap if loss.name == "smoothing-topk" else at.mean_gap
        value = selective_smoothing(at.lse, at.scale, at.gap, spread, at.correct, loss.alpha)
        if loss.name == REFERENCE:
            weights = reference_weights(at.correct, loss.alpha, at.window, at.unscored)
            return torch.zeros(len(at.unscored), dtype=value.dtype).index_add(0, at.window, value * weights)
        return value
    surprise = at.lse + at.scale * at.confidence_gap  # -log confidence
    if loss.name == "nll":
        return nll(at.lse, at.scale, at.gap)
    if loss.name == "top_label":
        return top_label_log_loss(surprise, at.correct)
    if loss.name == "nll+top_label":
        return nll(at.lse, at.scale, at.gap) + top_label_log_loss(surprise, at.correct)
    return top_label_brier(surprise, at.correct)


# --- proper losses ----------------------------------------------------------------------------------------------------


def nll(lse: Tensor, scale: Tensor, gap: Tensor) -> Tensor:
    """Return -log p_y, `[N]` nats."""
    return lse + scale * gap


def top_label_log_loss(surprise: Tensor, correct: Tensor) -> Tensor:
    """Return the binary log loss of "this is right" at confidence exp(-surprise), `[N]` nats."""
    wrong = -torch.expm1(-surprise.clamp_min(0.0))  # 1 - confidence without cancellation
    return torch.where(correct, surprise, -wrong.clamp_min(_SMALLEST).log())


def top_label_brier(surprise: Tensor, correct: Tensor) -> Tensor:
    """Return the squared distance of the confidence exp(-surprise) from 1 where right and from 0 where wrong, `[N]`."""
    return (torch.exp(-surprise.clamp_min(0.0)) - correct.to(surprise.dtype)).square()


def answer_log_confidence(log_p: Tensor, answer: Tensor, aggregate: str) -> Tensor:
    """Return the log of each answer's confidence, `[A]`.

    Args:
        log_p: `[N]` log probability of each token of the answers, in the order of the text.
        answer: `[N]` the answer each belongs to, 0 to A - 1 in rising order, none without a token.
        aggregate: "mean" of the probabilities (the paper's evaluation), "geometric_mean", "product" (the probability of the
            whole answer), "min", "first" or "last" token.
    """
    count = torch.bincount(answer)
    if aggregate in ("first", "last"):
        end = count.cumsum(0)
        return log_p[end - count if aggregate == "first" else end - 1]
    empty = torch.zeros(len(count), dtype=log_p.dtype, device=log_p.device)
    if aggregate == "min":
        return empty.scatter_reduce(0, answer, log_p, "amin", include_self=False)
    if aggregate == "mean":
        mean = empty.index_add(0, answer, log_p.exp()) / count
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    total = empty.index_add(0, answer, log_p)
    return total if aggregate == "product" else total / count


def answer_log_loss(log_p: Tensor, answer: Tensor, grade: Tensor, aggregate: str) -> Tensor:
    """Return the binary log loss of each answer's confidence against its grade, `[A]` nats.

    Args:
        log_p: see `answer_log_confidence`.
        answer: see `answer_log_confidence`.
        grade: `[N]` bool, the grade of the answer, the same at all of its tokens.
        aggregate: one of AGGREGATES.
    """
    end = torch.bincount(answer).cumsum(0)
    return top_label_log_loss(-answer_log_confidence(log_p, answer, aggregate), grade[end - 1])


# --- selective smoothing ----------------------------------------------------------------------------------------------


def selective_smoothing(
    lse: Tensor, scale: Tensor, gap: Tensor, spread_gap: Tensor, correct: Tensor, alpha: float
) -> Tensor:
    """Return the paper's loss of each token, `[N]`; its mean over the scored tokens does not depend on the micro-batch.

    Args:
        lse: L(s).
        scale: s.
        gap: m - z_y.
        spread_gap: m minus the mean of the logits that a wrong token is spread over: the vocabulary, or the TOP_K largest.
        correct: where the top token is the target.
        alpha: a correct token counts (1 - alpha)(-log p_y), a wrong one alpha times the mean of -log p_i. The mean, as in the
            paper's code; its text sums over the vocabulary.
    """
    return torch.where(correct, (1.0 - alpha) * (lse + scale * gap), alpha * (lse + scale * spread_gap))


def reference_weights(correct: Tensor, alpha: float, window: Tensor, unscored: Tensor) -> Tensor:
    """Return `[N]` factors: the sum of a window's `selective_smoothing` values times these is its loss in the paper's code.

    The code reads one sequence at a time. It averages the correct and the wrong tokens apart and weighs the averages by
    (1 - alpha) times the fraction of wrong tokens and alpha times the fraction of correct ones, divided by their sum. Prompt
    tokens count as wrong ones of loss 0. So a token's weight depends on the rest of its sequence and on the length of the
    prompt, and a sequence of correct tokens only, or of wrong ones only, has loss 0.

    Args:
        correct: `[N]` of the scored tokens.
        alpha: as in `selective_smoothing`.
        window: `[N]` the window of each, 0 to W - 1.
        unscored: `[W]` number of tokens that are predicted and do not count, in each window.
    """
    count = torch.bincount(window, minlength=len(unscored))
    right = torch.bincount(window, weights=correct.double(), minlength=len(unscored))
    wrong = count - right + unscored
    total = ((1.0 - alpha) * wrong + alpha * right).clamp_min(1e-300)
    # without alpha and 1 - alpha, which `selective_smoothing` has already put in
    for_right, for_wrong = wrong / right.clamp_min(1.0) / total, right / wrong.clamp_min(1.0) / total
    return torch.where(correct, for_right[window], for_wrong[window]).to(torch.get_default_dtype())
