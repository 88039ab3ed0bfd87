"""Calibration over bins of confidence: ECE, Brier decomposition, debiased L2 error.

Each is a function of three sums per bin, so the same formula gives the value on all answers (`[bins]`) and the values of
all bootstrap draws (`[draws, bins]`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.errors import DataError

Array = NDArray[np.float64]
BINS = 15
_ROUNDING = 1e-6  # a float32 softmax may end a hair above 1


@dataclass(frozen=True)
class BinSums:
    """Per bin `[..., bins]`: number of answers, sum of their confidence, number of right ones."""

    count: Array
    confidence: Array
    correct: Array


def checked_confidence(confidence: ArrayLike) -> Array:
    """Return confidences as float64 in [0, 1].

    Raises:
        DataError: one is NaN or no probability.
    """
    values = np.asarray(confidence, dtype=np.float64)
    wrong = values[~((values >= -_ROUNDING) & (values <= 1 + _ROUNDING))]
    if wrong.size:
        raise DataError(f"expected confidences in [0, 1], got {wrong.size} others, the first {wrong[0]}")
    return np.clip(values, 0.0, 1.0)


def checked_answers(confidence: ArrayLike, correct: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """Return `[N]` confidences as float64 in [0, 1] and `[N]` booleans.

    Raises:
        DataError: no answers, two lengths, a confidence that is NaN or no probability, a `correct` that is neither 0 nor 1.
    """
    values, right = checked_confidence(confidence), np.asarray(correct)
    if values.ndim != 1 or values.shape != right.shape or len(values) == 0:
        raise DataError(
            f"expected one confidence and one right-or-wrong per answer, got shapes {values.shape} and {right.shape}"
        )
    if not np.isin(right, (0, 1)).all():
        raise DataError(f"expected `correct` to hold booleans (or 0 and 1), got {np.unique(right)[:5].tolist()}")
    return values, right.astype(bool)


# --- bins -------------------------------------------------------------------------------------------------------------


def equal_width_bins(confidence: Array, bins: int = BINS) -> NDArray[np.int64]:
    """Return the bin of each confidence: [k/bins, (k+1)/bins), the last closed, so that 1.0 counts."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def equal_mass_edges(confidence: Array, bins: int = BINS) -> Array:
    """Return the inner edges, ascending and distinct, of bins of as equal a count as ties allow.

    Bin k is [edge k-1, edge k). No bin is empty, so ties or few answers give fewer bins.
    """
    order = np.sort(confidence)
    edges = np.unique(order[[len(order) * k // bins for k in range(1, bins)]])
    return edges[edges > order[0]]


def equal_mass_bins(confidence: Array, bins: int = BINS) -> NDArray[np.int64]:
    """Return bins of as equal a count as ties allow: equal confidences share a bin."""
    return np.searchsorted(equal_mass_edges(confidence, bins), confidence, side="right").astype(np.int64)


def bin_sums(confidence: Array, correct: NDArray[np.bool_], bin_of: NDArray[np.int64]) -> BinSums:
    """Return the sums of each bin over all answers."""
    right = correct.astype(np.float64)
    return BinSums(
        *(np.bincount(bin_of, weights=w).astype(np.float64) for w in (np.ones_like(right), confidence, right))
    )


def _divide(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


# --- expected calibration error ---------------------------------------------------------------------------------------


def ece_of(sums: BinSums) -> Array:
    """Return `[...]`: sum over bins of |sum of correct - sum of confidence| / N."""
    return np.abs(sums.correct - sums.confidence).sum(-1) / sums.count.sum(-1)


def calibration_error(confidence: Array, correct: NDArray[np.bool_], bin_of: NDArray[np.int64]) -> float:
    """Return the expected calibration error (ECE) over the given bins."""
    return float(ece_of(bin_sums(confidence, correct, bin_of)))


def expected_calibration_error(confidence: Array, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Return the ECE over equal-width bins, closed at 1.0."""
    return calibration_error(confidence, correct, equal_width_bins(confidence, bins))


def squared_error_of(sums: BinSums) -> Array:
    """Return `[...]`: sum over bins of share * (accuracy - mean confidence)^2, the Brier score's reliability."""
    return _divide((sums.correct - sums.confidence) ** 2, sums.count).sum(-1) / sums.count.sum(-1)


def debiased_squared_error_of(sums: BinSums) -> Array:
    """Return `[...]`: `squared_error_of` less what sampling of the labels adds to it; may be negative.

    A bin of n answers with accuracy a adds a (1 - a) / (n - 1), for independent answers; a bin of one answer tells nothing
    and counts 0 (Kumar et al. 2019, arXiv 1909.10155, section 5).
    """
    accuracy = _divide(sums.correct, sums.count)
    squared = _divide(sums.correct - sums.confidence, sums.count) ** 2
    noise = _divide(accuracy * (1 - accuracy), sums.count - 1)
    return (sums.count * np.where(sums.count > 1, squared - noise, 0.0)).sum(-1) / sums.count.sum(-1)


def debiased_calibration_error(confidence: Array, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Return the debiased L2 calibration error over equal-mass bins, 0 where its square would be negative."""
    squared = debiased_squared_error_of(bin_sums(confidence, correct, equal_mass_bins(confidence, bins)))
    return float(np.sqrt(max(float(squared), 0.0)))


# --- Brier score ------------------------------------------------------------------------------------------------------


def brier_decomposition(confidence: Array, correct: NDArray[np.bool_], bins: int = BINS) -> dict[str, float]:
    """Split the Brier score over the equal-width bins of the ECE.

    brier = reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance
          = reliability - generalised_resolution + uncertainty, both exactly (Stephenson, Coelho and Jolliffe 2008). The
    three classical terms alone add up only where all confidences of a bin are equal.

    Returns:
        brier and the terms above; reliability is 0 for a calibrated model, resolution is how far the bins' accuracies lie
        from the overall accuracy, uncertainty is accuracy * (1 - accuracy), generalised_resolution takes in what the
        confidences of one bin tell apart.
    """
    bin_of = equal_width_bins(confidence, bins)
    sums = bin_sums(confidence, correct, bin_of)
    right = correct.astype(np.float64)
    accuracy = float(right.mean())
    mean_confidence, mean_correct = _divide(sums.confidence, sums.count), _divide(sums.correct, sums.count)
    inside = confidence - mean_confidence[bin_of]
    brier = float(((confidence - right) ** 2).mean())
    return {
        "brier": brier,
        "reliability": float(squared_error_of(sums)),
        "resolution": float((sums.count * (mean_correct - accuracy) ** 2).sum() / len(right)),
        "uncertainty": accuracy * (1 - accuracy),
        "within_bin_variance": float((inside**2).mean()),
        "within_bin_covariance": float(2 * (inside * (right - mean_correct[bin_of])).mean()),
        "generalised_resolution": float(generalised_resolution_of(sums, np.float64(brier))),
    }


def generalised_resolution_of(sums: BinSums, brier: Array | np.float64) -> Array:
    """Return `[...]`: reliability + uncertainty - Brier score `[...]`."""
    accuracy = sums.correct.sum(-1) / sums.count.sum(-1)
    return squared_error_of(sums) + accuracy * (1 - accuracy) - brier
