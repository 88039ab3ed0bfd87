"""Losses of cached features, and the fit of one number by search. `fit_heads` and `fit_vector` fit the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmrl.ats.answer_level import answers_of
from llmrl.ats.features import TokenFeatures
from llmrl.ats.losses import Loss, Tempered, calibration_loss
from llmrl.ats.metrics import Predictions, expected_calibration_error
from llmrl.errors import DataError
from llmrl.heads import HeadSpec
from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE, TemperatureHead
from llmrl_kernels import lse_interpolate


@dataclass(frozen=True)
class FitRecord:
    """One epoch of a fit; `alpha` of the smoothing losses, else None."""

    epoch: int
    fit_loss: float
    validation_loss: float
    alpha: float | None = None


def curve_loss(loss: Loss, features: TokenFeatures, log_scale: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return values whose mean is the loss, through the curve; differentiable in `log_scale`.

    Args:
        loss: which.
        features: N tokens; for the loss "answer" only graded ones, see `tokens_of_loss`.
        log_scale: `[M]` of the tokens at the indices `tokens` `[M]` (None: of all).
        tokens: for a loss of whole windows all those of each window, in order.
    """
    lse = lse_interpolate(features.curve, features.slope, log_scale, tokens)
    picked = slice(None) if tokens is None else tokens
    gap, graded = features.gap[picked], features.graded[picked]
    numbers, window = features.window[picked].unique_consecutive(return_inverse=True)
    at = Tempered(
        lse=lse,
        scale=log_scale.exp(),
        gap=gap,
        mean_gap=features.mean_gap[picked],
        top_gap=features.top_gap[picked],
        confidence_gap=torch.where(graded, gap, 0.0),
        correct=features.correct[picked],
        window=window,
        unscored=features.unscored[numbers] if len(features.unscored) else torch.zeros_like(numbers),
    )
    return calibration_loss(loss, at)


def tokens_of_loss(loss: Loss, features: TokenFeatures) -> TokenFeatures:
    """Return the tokens that `loss` can be computed on: for "answer" those of graded answers, else all.

    Raises:
        DataError: the loss is "answer" and no answer is graded.
    """
    if loss.name != "answer":
        return features
    if not features.graded.any():
        raise DataError("the loss 'answer' needs graded answers, and the data have none: use another --loss")
    return features.select(features.graded)


def fit_temperature(features: TokenFeatures, loss: Loss | None, aggregate: str = "mean") -> float:
    """Return the log s in [-3, log 10] that minimises the mean loss, or the ECE if `loss` is None.

    Where all tokens are of graded answers the ECE is that of the answers, their confidences made by `aggregate`.
    """
    if len(features) == 0:
        return 0.0
    if loss is not None:
        features = tokens_of_loss(loss, features)

    def score(log_scale: float) -> float:
        constant = torch.full((len(features),), log_scale)
        if loss is None:
            return _ece(features, constant, aggregate)
        return curve_loss(loss, features, constant).double().mean().item()

    # NLL is convex in s; ECE and the top-label loss are not everywhere, so a grid comes first
    return line_search(score, MIN_LOG_SCALE, MAX_LOG_SCALE, 54)


def _ece(features: TokenFeatures, log_scale: Tensor, aggregate: str) -> float:
    said, right = confidence(features, log_scale).numpy(), features.correct.numpy()
    if features.graded.all():
        answers = answers_of(Predictions(said, right, said, features.window.numpy()), aggregate)
        said, right = answers.confidence, answers.correct
    return expected_calibration_error(said, right)


def line_search(score: Callable[[float], float], low: float, high: float, points: int) -> float:
    """Return where `score` is least in [low, high]: the best of evenly spaced points, then of finer ones around it."""
    grid = torch.linspace(low, high, points).tolist()
    best, step = min(grid, key=score), grid[1] - grid[0]
    for _ in range(4):
        best = min((min(max(best + step * (k / 4 - 1), low), high) for k in range(9)), key=score)
        step /= 4
    return best


def confidence(features: TokenFeatures, log_scale: Tensor) -> Tensor:
    """Return the confidence of each token at `log_scale` `[N]`, through the curve, `[N]` float64."""
    lse = lse_interpolate(features.curve, features.slope, log_scale).double().clamp_min(0.0)
    return torch.exp(-(lse + log_scale.double().exp() * features.confidence_gap))


def scalar_head(log_scale: float, hidden_size: int) -> TemperatureHead:
    """Return a head that multiplies every logit by exp(log_scale)."""
    head = TemperatureHead(HeadSpec("temperature", "scalar", hidden_size))
    with torch.no_grad():
        head.bias.fill_(log_scale)
    return head.requires_grad_(False)


def shuffle_hidden(features: TokenFeatures, seed: int) -> TokenFeatures:
    """Return the same tokens with their hidden states dealt out at random: what a head can do without reading them."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return replace(features, row=features.row[order], offsets=features.offsets[:0])
