"""Calibration metrics of top-1 confidence, with 95% bootstrap intervals and paired differences.

What a metric is stands in `binned`, `smooth_ece` and `selective`; how the draws are made in `bootstrap`, and the intervals
in `llmrl.intervals`. Two methods share the draws, which makes their difference paired. Under a draw

- AUROC and AURC are taken over 512 bins of equal mass, within which answers count as tied (see the tests: within 1e-3);
- smooth ECE keeps the width found on all tokens. Chosen anew in each draw, the width grows with the noise of the draw: at
  errors of 0.01 and 0.02 the intervals then held the truth in 63 to 93% of samples, with one width in 82 to 96%;
- the debiased error is moved, on the scale of its square, to have its estimate as mean. Drawn windows add noise that the
  debiasing formula, made for independent answers, does not know; the percentiles of the moved draws are the interval.

`ece` and `smooth_ece` are sums of absolute values, which sampling can only raise: for a model with no error at all their
intervals miss 0 about half of the time. Those of `ece_debiased` and `brier_reliability` hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmrl.ats.binned import (
    BINS,
    BinSums,
    bin_sums,
    brier_decomposition,
    calibration_error,
    debiased_calibration_error,
    debiased_squared_error_of,
    ece_of,
    equal_mass_bins,
    equal_width_bins,
    expected_calibration_error,
    generalised_resolution_of,
    squared_error_of,
)
from llmrl.ats.bootstrap import MIN_CLUSTERS, clusters_of, draw_weights, sums_by_draw
from llmrl.ats.selective import aurc, aurc_of
from llmrl.ats.smooth_ece import GRID, residuals_on_grid, smooth_ece, smooth_ece_at, smooth_on_grid
from llmrl.intervals import interval

__all__ = [
    "BINS",
    "LOWER_IS_BETTER",
    "METRICS",
    "MIN_CLUSTERS",
    "Predictions",
    "auroc",
    "bootstrap_metrics",
    "calibration_error",
    "clusters_of",
    "compare_methods",
    "draw_weights",
    "equal_mass_bins",
    "equal_width_bins",
    "expected_calibration_error",
    "point_metrics",
    "reliability_by_kernel",
    "reliability_curve",
]

Array = NDArray[np.float64]
METRICS = (
    "ece",
    "ece_equal_mass",
    "nll",
    "brier",
    "auroc",
    "accuracy",
    "smooth_ece",
    "brier_reliability",
    "brier_resolution",
    "aurc",
    "ece_debiased",
)
LOWER_IS_BETTER = (
    "ece",
    "ece_equal_mass",
    "nll",
    "brier",
    "smooth_ece",
    "brier_reliability",
    "aurc",
    "ece_debiased",
)
_RANK_BINS = 512


@dataclass(frozen=True)
class Predictions:
    """Of one method, per token `[N]`: top-1 confidence, whether top-1 was right, -log p of the target, its window.

    Of graded answers each is an answer's, and with `questions` `window` is the question it answers: what the bootstrap draws.
    """

    confidence: Array
    correct: NDArray[np.bool_]
    nll: Array
    window: NDArray[np.int64]
    questions: bool = False


def auroc(confidence: Array, correct: NDArray[np.bool_]) -> float:
    """Return the probability that a right answer has more confidence than a wrong one, ties counting half.

    NaN when all answers are right or all are wrong.
    """
    positives = int(correct.sum())
    negatives = len(correct) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, inverse, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2.0
    return float((mean_rank[inverse][correct].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def point_metrics(p: Predictions) -> dict[str, float]:
    """Return every metric of METRICS on all tokens.

    `brier_resolution` is the generalised one, so that brier = brier_reliability - brier_resolution + accuracy * (1 -
    accuracy).
    """
    brier = brier_decomposition(p.confidence, p.correct)
    return {
        "ece": expected_calibration_error(p.confidence, p.correct),
        "ece_equal_mass": calibration_error(p.confidence, p.correct, equal_mass_bins(p.confidence)),
        "nll": float(p.nll.mean()),
        "brier": brier["brier"],
        "auroc": auroc(p.confidence, p.correct),
        "accuracy": float(p.correct.mean()),
        "smooth_ece": smooth_ece(p.confidence, p.correct),
        "brier_reliability": brier["reliability"],
        "brier_resolution": brier["generalised_resolution"],
        "aurc": aurc(p.confidence, p.correct),
        "ece_debiased": debiased_calibration_error(p.confidence, p.correct),
    }


# --- bootstrap --------------------------------------------------------------------------------------------------------


def bootstrap_metrics(p: Predictions, weights: Array) -> dict[str, Array]:
    """Return `[draws]` values of every metric under the draws of `draw_weights`."""
    p, window = _by_window(p)
    windows = weights.shape[1]
    size = weights @ np.bincount(window, minlength=windows)
    right = p.correct.astype(np.float64)

    def mean(values: Array) -> Array:
        return (weights @ np.bincount(window, weights=values, minlength=windows)) / size

    def sums(bin_of: NDArray[np.int64]) -> BinSums:
        cells = int(bin_of.max()) + 1
        return BinSums(
            sums_by_draw(weights, window, bin_of, cells),
            sums_by_draw(weights, window, bin_of, cells, p.confidence),
            sums_by_draw(weights, window, bin_of, cells, right),
        )

    brier = mean((p.confidence - right) ** 2)
    equal_width, equal_mass = sums(equal_width_bins(p.confidence)), sums(equal_mass_bins(p.confidence))
    return {
        "ece": ece_of(equal_width),
        "ece_equal_mass": ece_of(equal_mass),
        "nll": mean(p.nll),
        "brier": brier,
        "accuracy": mean(right),
        "smooth_ece": _bootstrap_smooth_ece(p, window, weights, size),
        "brier_reliability": squared_error_of(equal_width),
        "brier_resolution": generalised_resolution_of(equal_width, brier),
        "ece_debiased": _bootstrap_debiased(p, equal_mass),
        **_bootstrap_ranks(p, window, weights),
    }


def _by_window(p: Predictions) -> tuple[Predictions, NDArray[np.int64]]:
    # tokens in the order of their windows, and the windows numbered from 0
    _, window = np.unique(p.window, return_inverse=True)
    if (np.diff(window) < 0).any():
        order = np.argsort(window, kind="stable")
        p, window = Predictions(p.confidence[order], p.correct[order], p.nll[order], p.window[order]), window[order]
    return p, window


def _bootstrap_smooth_ece(p: Predictions, window: NDArray[np.int64], weights: Array, size: Array) -> Array:
    bandwidth = max(smooth_ece(p.confidence, p.correct), 1 / GRID)
    cell, residual = equal_width_bins(p.confidence, GRID), p.correct - p.confidence
    return smooth_ece_at(sums_by_draw(weights, window, cell, GRID, residual), bandwidth) / size


def _bootstrap_debiased(p: Predictions, equal_mass: BinSums) -> Array:
    estimate = debiased_squared_error_of(bin_sums(p.confidence, p.correct, equal_mass_bins(p.confidence)))
    squared = squared_error_of(equal_mass)
    return np.sqrt(np.maximum(squared - squared.mean() + estimate, 0.0))


def _bootstrap_ranks(p: Predictions, window: NDArray[np.int64], weights: Array) -> dict[str, Array]:
    bin_of = equal_mass_bins(p.confidence, _RANK_BINS)
    cells = int(bin_of.max()) + 1
    positives = sums_by_draw(weights, window[p.correct], bin_of[p.correct], cells)
    negatives = sums_by_draw(weights, window[~p.correct], bin_of[~p.correct], cells)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(1) * negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = np.where(pairs > 0, (positives * below).sum(1) / pairs, np.nan)
    return {"auroc": area, "aurc": aurc_of((positives + negatives)[:, ::-1], negatives[:, ::-1])}


def _interval(metric: str, value: float, draws: Array, *, difference: bool = False) -> dict[str, float]:
    # a poor model's resolution is negative: what its confidence tells apart inside a bin, it has the wrong way round
    floor = None if difference or metric == "brier_resolution" else 0.0
    ceiling = None if difference or metric == "nll" else 1.0
    return interval(value, draws, floor, ceiling, basic=metric != "ece_debiased")


def compare_methods(
    predictions: dict[str, Predictions], *, seed: int = 0, draws: int = 1000, pairs: list[tuple[str, str]] | None = None
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, dict[str, float]]]]:
    """Score every method on the same tokens.

    Args:
        predictions: name -> predictions; all over the same tokens in the same order.
        seed: of the draws.
        draws: number of bootstrap draws.
        pairs: (a, b) for which a - b is reported.

    Returns:
        name -> metric -> {"value", "low", "high"}, and the same for "a - b", paired: an interval without 0 is a difference.
    """
    first = next(iter(predictions.values()))
    window = clusters_of(first.window, questions=first.questions)[0]
    predictions = {name: replace(p, window=window) for name, p in predictions.items()}
    weights = draw_weights(window, draws, seed)
    points = {name: point_metrics(p) for name, p in predictions.items()}
    samples = {name: bootstrap_metrics(p, weights) for name, p in predictions.items()}
    methods = {
        name: {metric: _interval(metric, points[name][metric], samples[name][metric]) for metric in METRICS}
        for name in predictions
    }
    differences = {
        f"{a} - {b}": {
            metric: _interval(
                metric, points[a][metric] - points[b][metric], samples[a][metric] - samples[b][metric], difference=True
            )
            for metric in METRICS
        }
        for a, b in pairs or []
    }
    return methods, differences


# --- curves -----------------------------------------------------------------------------------------------------------


def reliability_curve(p: Predictions, bins: int = BINS) -> dict[str, list[float | int | None]]:
    """Return per equal-width bin: mean confidence, accuracy (null in an empty bin) and count."""
    bin_of = equal_width_bins(p.confidence, bins)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        confidence = np.bincount(bin_of, weights=p.confidence, minlength=bins) / count
        accuracy = np.bincount(bin_of, weights=p.correct.astype(np.float64), minlength=bins) / count
    return {"confidence": confidence.tolist(), "accuracy": accuracy.tolist(), "count": count.tolist()}


def reliability_by_kernel(p: Predictions, points: int = 101, weights: Array | None = None) -> dict[str, list[float]]:
    """Return the reliability curve without bins: accuracy along confidence, smoothed with the width of the smooth ECE.

    Accuracy is confidence plus the smoothed residual, so that the gap to the diagonal, averaged over the density, is the
    smooth ECE. It is NaN where fewer than one token is near.

    Args:
        p: predictions.
        points: number of confidences, spread evenly over [0, 1].
        weights: `[draws, windows]` of `draw_weights`, for a 95% band at each point.

    Returns:
        "confidence", "accuracy", "density" (its mean over [0, 1] is 1), each `[points]`; "bandwidth", `[1]`; with
        `weights` also "low" and "high".
    """
    p, window = _by_window(p)
    at = np.linspace(0, GRID - 1, points).round().astype(np.int64)
    cell, tokens = equal_width_bins(p.confidence, GRID), len(p.confidence)
    bandwidth = max(smooth_ece(p.confidence, p.correct), 1 / GRID)
    confidence = (at + 0.5) / GRID
    density = smooth_on_grid(np.bincount(cell, minlength=GRID).astype(np.float64) * (GRID / tokens), bandwidth)[at]
    near = density * tokens * bandwidth * 2 * np.sqrt(np.pi) >= 1

    def accuracy(residual: Array, count: Array) -> Array:
        gap = np.divide(residual, count, out=np.full_like(residual, np.nan), where=near & (count > 0))
        return np.clip(confidence + gap, 0.0, 1.0)

    residual = smooth_on_grid(residuals_on_grid(p.confidence, p.correct) * GRID, bandwidth)[at]
    curve = {"confidence": confidence, "accuracy": accuracy(residual, density), "density": density}
    if weights is not None:
        drawn = [sums_by_draw(weights, window, cell, GRID, v) for v in (p.correct - p.confidence, None)]
        band = accuracy(*(smooth_on_grid(values, bandwidth)[:, at] for values in drawn))
        curve["low"], curve["high"] = np.nanpercentile(band, [2.5, 97.5], axis=0)
    return {**{name: values.tolist() for name, values in curve.items()}, "bandwidth": [bandwidth]}
