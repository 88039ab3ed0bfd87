"""Calibration metrics of top-1 confidence, with 95% bootstrap intervals and paired differences.

Tokens of one window are not independent, so the bootstrap draws windows, not tokens. Every metric is a function of sums
over windows (counts per bin), so 1,000 draws are one matrix product: the weights of the draws times the sums of the
windows. Two methods share the draws, which makes their difference paired.

Intervals are basic bootstrap intervals, [2v - high, 2v - low] of the percentiles. Resampling adds noise to every bin, which
lifts each ECE, as sampling has lifted the estimate v itself; the basic interval takes that bias off, where the percentile
interval doubles it. An interval is widened to hold its own estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BINS = 15
_AUROC_BINS = 512
METRICS = ("ece", "ece_equal_mass", "nll", "brier", "auroc", "accuracy")
MIN_CLUSTERS = 20
LOWER_IS_BETTER = ("ece", "ece_equal_mass", "nll", "brier")


@dataclass(frozen=True)
class Predictions:
    """Of one method, per token `[N]`: top-1 confidence, whether top-1 was right, -log p of the target, its window."""

    confidence: Array
    correct: NDArray[np.bool_]
    nll: Array
    window: NDArray[np.int64]


def equal_width_bins(confidence: Array, bins: int = BINS) -> NDArray[np.int64]:
    """Return the bin of each confidence: [k/bins, (k+1)/bins), the last closed, so that 1.0 counts."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def equal_mass_bins(confidence: Array, bins: int = BINS) -> NDArray[np.int64]:
    """Return bins of as equal a count as ties allow: equal confidences share a bin."""
    order = np.sort(confidence)
    edges = order[[len(order) * k // bins for k in range(1, bins)]]
    return np.searchsorted(np.unique(edges), confidence, side="right").astype(np.int64)


def calibration_error(confidence: Array, correct: NDArray[np.bool_], bin_of: NDArray[np.int64]) -> float:
    """Return sum over bins of |sum of correct - sum of confidence| / N (expected calibration error)."""
    gap = np.bincount(bin_of, weights=correct.astype(np.float64) - confidence)
    return float(np.abs(gap).sum() / len(confidence))


def expected_calibration_error(confidence: Array, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Return the ECE over equal-width bins, closed at 1.0."""
    return calibration_error(confidence, correct, equal_width_bins(confidence, bins))


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
    """Return every metric of METRICS on all tokens."""
    return {
        "ece": expected_calibration_error(p.confidence, p.correct),
        "ece_equal_mass": calibration_error(p.confidence, p.correct, equal_mass_bins(p.confidence)),
        "nll": float(p.nll.mean()),
        "brier": float(((p.confidence - p.correct) ** 2).mean()),
        "auroc": auroc(p.confidence, p.correct),
        "accuracy": float(p.correct.mean()),
    }


# --- bootstrap --------------------------------------------------------------------------------------------------------


def draw_weights(window: NDArray[np.int64], draws: int, seed: int) -> Array:
    """Return how often each window is drawn, `[draws, windows]`; windows are numbered by their sorted index."""
    count = len(np.unique(window))
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1.0 / count), size=draws).astype(np.float64)


def bootstrap_metrics(p: Predictions, weights: Array) -> dict[str, Array]:
    """Return `[draws]` values of every metric under the draws of `draw_weights`."""
    _, window = np.unique(p.window, return_inverse=True)
    windows = weights.shape[1]
    size = weights @ np.bincount(window, minlength=windows)
    right = p.correct.astype(np.float64)

    def mean(values: Array) -> Array:
        return (weights @ np.bincount(window, weights=values, minlength=windows)) / size

    def ece(bin_of: NDArray[np.int64]) -> Array:
        count = int(bin_of.max()) + 1
        gaps = np.bincount(window * count + bin_of, weights=right - p.confidence, minlength=windows * count)
        return np.abs(weights @ gaps.reshape(windows, count)).sum(1) / size

    return {
        "ece": ece(equal_width_bins(p.confidence)),
        "ece_equal_mass": ece(equal_mass_bins(p.confidence)),
        "nll": mean(p.nll),
        "brier": mean((p.confidence - right) ** 2),
        "auroc": _bootstrap_auroc(p, window, weights),
        "accuracy": mean(right),
    }


def _bootstrap_auroc(p: Predictions, window: NDArray[np.int64], weights: Array) -> Array:
    # over fine quantile bins: within a bin pairs count half, which moves the value by less than 1e-3; see tests
    bin_of = equal_mass_bins(p.confidence, _AUROC_BINS)
    count, windows = int(bin_of.max()) + 1, weights.shape[1]
    cells = windows * count

    def per_draw(mask: NDArray[np.bool_]) -> Array:
        table = np.bincount((window * count + bin_of)[mask], minlength=cells).reshape(windows, count)
        return weights @ table

    positives, negatives = per_draw(p.correct), per_draw(~p.correct)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(1) * negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (positives * below).sum(1) / pairs, np.nan)


def interval(value: float, draws: Array, floor: float | None = 0.0, ceiling: float | None = None) -> dict[str, float]:
    """Return `value` with its 95% basic bootstrap interval, widened to hold `value`, cut at `floor` and `ceiling`."""
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0 or not np.isfinite(value):
        return {"value": value, "low": float("nan"), "high": float("nan")}
    lower, upper = np.percentile(finite, [2.5, 97.5]).tolist()
    low, high = min(value, 2 * value - upper), max(value, 2 * value - lower)
    return {
        "value": value,
        "low": low if floor is None else max(floor, low),
        "high": high if ceiling is None else min(ceiling, high),
    }


def clusters_of(window: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """Return what the bootstrap draws, a cluster number per token, and its name.

    Windows, or, where there are fewer than MIN_CLUSTERS of them, blocks of consecutive tokens: one window drawn again and
    again would give an interval of no width.
    """
    if len(np.unique(window)) >= MIN_CLUSTERS:
        return window, "window"
    size = max(1, len(window) // (2 * MIN_CLUSTERS))
    return np.arange(len(window), dtype=np.int64) // size, f"block of {size} tokens"


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
    window = clusters_of(next(iter(predictions.values())).window)[0]
    predictions = {name: replace(p, window=window) for name, p in predictions.items()}
    weights = draw_weights(window, draws, seed)
    points = {name: point_metrics(p) for name, p in predictions.items()}
    samples = {name: bootstrap_metrics(p, weights) for name, p in predictions.items()}
    methods = {
        name: {
            metric: interval(points[name][metric], samples[name][metric], ceiling=None if metric == "nll" else 1.0)
            for metric in METRICS
        }
        for name in predictions
    }
    differences = {
        f"{a} - {b}": {
            metric: interval(points[a][metric] - points[b][metric], samples[a][metric] - samples[b][metric], floor=None)
            for metric in METRICS
        }
        for a, b in pairs or []
    }
    return methods, differences


def reliability_curve(p: Predictions, bins: int = BINS) -> dict[str, list[float | int | None]]:
    """Return per equal-width bin: mean confidence, accuracy (null in an empty bin) and count."""
    bin_of = equal_width_bins(p.confidence, bins)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        confidence = np.bincount(bin_of, weights=p.confidence, minlength=bins) / count
        accuracy = np.bincount(bin_of, weights=p.correct.astype(np.float64), minlength=bins) / count
    return {"confidence": confidence.tolist(), "accuracy": accuracy.tolist(), "count": count.tolist()}
