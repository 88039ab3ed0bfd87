"""Recalibration of one confidence: a map from [0, 1] to [0, 1] fitted on answers known to be right or wrong.

A head changes the probabilities of a token; a recalibrator changes a number that was made from them, such as the confidence
of a whole answer. Each fit is a few numbers that go through JSON:

- isotonic: the non-decreasing step function nearest to the answers in squared error, linear between its steps;
- histogram: the accuracy of each of 15 bins of equal mass (Zadrozny and Elkan 2001);
- platt: sigmoid(slope * logit(confidence) + intercept) by maximum likelihood (Platt 1999);
- scaling_binning: Platt's curve, then the mean of its values in each of 15 bins of equal mass (Kumar et al. 2019, arXiv
  1909.10155): as few values as a histogram, but averages of a curve instead of labels, hence with less noise.

isotonic and histogram return exactly 0 or 1 where all answers of a step were wrong or right, which can make a log loss
infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.ats.binned import BINS, checked_answers, checked_confidence, equal_mass_edges
from llmrl.errors import DataError, did_you_mean

Array = NDArray[np.float64]
_CLIP = 1e-12  # confidences of exactly 0 and 1 have no logit


@dataclass(frozen=True)
class Recalibration:
    """A fitted map; call it on confidences.

    Attributes:
        kind: one of KINDS.
        slope: of Platt's curve, None where there is none.
        intercept: of Platt's curve.
        x: isotonic: the knots, ascending; histogram and scaling_binning: the inner edges of the bins, bin k being
            [x[k-1], x[k]); platt: empty.
        y: value at each knot or in each bin, one more than edges.
    """

    kind: str
    slope: float | None = None
    intercept: float | None = None
    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown kind of recalibration '{self.kind}'{did_you_mean(self.kind, KINDS)}")
        steps = {"isotonic": max(1, len(self.x)), "platt": 0}.get(self.kind, len(self.x) + 1)
        curve = {"platt": True, "scaling_binning": self.slope is not None}.get(self.kind, False)
        if len(self.y) != steps or (self.slope is not None) != curve or (self.intercept is not None) != curve:
            raise DataError(
                f"no {self.kind} recalibration: {len(self.x)} x, {len(self.y)} y, slope {self.slope}, "
                f"intercept {self.intercept}; fit it again"
            )
        if list(self.x) != sorted(self.x):
            raise DataError(f"no {self.kind} recalibration: x does not ascend; fit it again")

    def __call__(self, confidence: ArrayLike) -> Array:
        """Return the recalibrated confidences, of the shape of `confidence`.

        Raises:
            DataError: a confidence is NaN or no probability.
        """
        values = checked_confidence(confidence)
        if self.slope is not None and self.intercept is not None:
            values = _sigmoid(self.slope * _logit(values) + self.intercept)
        if self.kind == "isotonic":
            return np.interp(values, self.x, self.y)
        if self.y:
            return np.asarray(self.y)[np.searchsorted(np.asarray(self.x), values, side="right")]
        return values

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain numbers and lists."""
        return {"kind": self.kind, "slope": self.slope, "intercept": self.intercept, "x": [*self.x], "y": [*self.y]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recalibration:
        """Return the map that `to_json` wrote.

        Raises:
            DataError: a key is missing or the numbers do not make a map of that kind.
        """
        try:
            x, y = tuple(map(float, data["x"])), tuple(map(float, data["y"]))
            return cls(data["kind"], data["slope"], data["intercept"], x, y)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a recalibration: {error!r}; expected the keys kind, slope, intercept, x, y") from None


def fit_recalibration(kind: str, confidence: ArrayLike, correct: ArrayLike) -> Recalibration:
    """Fit one of KINDS.

    Args:
        kind: isotonic, histogram, platt or scaling_binning.
        confidence: `[N]` in [0, 1].
        correct: `[N]` booleans.

    Raises:
        DataError: unknown kind, no answers, or values that are no confidences.
    """
    if kind not in KINDS:
        raise DataError(f"unknown kind of recalibration '{kind}'{did_you_mean(kind, KINDS)}")
    return KINDS[kind](confidence, correct)


def fit_isotonic(confidence: ArrayLike, correct: ArrayLike) -> Recalibration:
    """Fit by pooling adjacent violators; answers of equal confidence count as one point of their mean and number."""
    values, right = checked_answers(confidence, correct)
    x, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    # a block: sum, number, first and last position; a block joins the one before while its mean is no higher
    blocks: list[tuple[float, float, int, int]] = []
    for position, total in enumerate(np.bincount(inverse, weights=right).tolist()):
        size, first = float(count[position]), position
        while blocks and blocks[-1][0] * size >= total * blocks[-1][1]:
            before = blocks.pop()
            total, size, first = total + before[0], size + before[1], before[2]
        blocks.append((total, size, first, position))
    knots = [(x[i], total / size) for total, size, *ends in blocks for i in sorted(set(ends))]
    return Recalibration("isotonic", x=tuple(float(k[0]) for k in knots), y=tuple(k[1] for k in knots))


def fit_histogram(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> Recalibration:
    """Fit the accuracy of each bin of equal mass; ties and few answers give fewer bins."""
    values, right = checked_answers(confidence, correct)
    edges = equal_mass_edges(values, bins)
    return Recalibration("histogram", x=tuple(edges.tolist()), y=_means(edges, values, right.astype(np.float64)))


def fit_platt(confidence: ArrayLike, correct: ArrayLike) -> Recalibration:
    """Fit slope and intercept by Newton's method on the targets (R + 1) / (R + 2) for right and 1 / (W + 2) for wrong.

    These targets are Platt's, for R right and W wrong answers: the fit stays finite where confidence separates right from
    wrong, or where only one of them occurs.
    """
    values, right = checked_answers(confidence, correct)
    logits = _logit(values)
    positives = int(right.sum())
    target = np.where(right, (positives + 1) / (positives + 2), 1 / (len(right) - positives + 2))
    centre, spread = float(logits.mean()), float(logits.std())
    if spread < 1e-9:  # one confidence for all: nothing to tell them apart by
        mean = target.mean()
        return Recalibration("platt", slope=0.0, intercept=float(np.log(mean / (1 - mean))))
    design = np.stack([(logits - centre) / spread, np.ones_like(logits)], axis=1)
    slope, intercept = _logistic_regression(design, target).tolist()
    return Recalibration("platt", slope=slope / spread, intercept=intercept - slope * centre / spread)


def fit_scaling_binning(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS, *, scaled: bool = False
) -> Recalibration:
    """Fit Platt's curve, then average its values in bins of equal mass.

    Curve and bins are fitted on the same answers, as the authors' code does; their proofs use three separate parts.

    Args:
        confidence: `[N]`.
        correct: `[N]`.
        bins: at most so many.
        scaled: `confidence` comes out of a scaling already (such as a calibrated model): only bin it.
    """
    values, right = checked_answers(confidence, correct)
    curve = None if scaled else fit_platt(values, right)
    if curve is not None:
        values = curve(values)
    edges = equal_mass_edges(values, bins)
    return Recalibration(
        "scaling_binning",
        slope=curve.slope if curve else None,
        intercept=curve.intercept if curve else None,
        x=tuple(edges.tolist()),
        y=_means(edges, values, values),
    )


KINDS: dict[str, Callable[[ArrayLike, ArrayLike], Recalibration]] = {
    "isotonic": fit_isotonic,
    "histogram": fit_histogram,
    "platt": fit_platt,
    "scaling_binning": fit_scaling_binning,
}


def _means(edges: Array, values: Array, of: Array) -> tuple[float, ...]:
    bin_of = np.searchsorted(edges, values, side="right")
    return tuple((np.bincount(bin_of, weights=of) / np.bincount(bin_of)).tolist())


def _logit(values: Array) -> Array:
    values = np.clip(values, _CLIP, 1 - _CLIP)
    return np.log(values) - np.log1p(-values)


def _sigmoid(logits: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -logits))


def _logistic_regression(design: Array, target: Array) -> Array:
    """Return the `[features]` weights of least log loss; `target` in (0, 1)."""

    def loss(weights: Array) -> float:
        logits = design @ weights
        return float((np.logaddexp(0.0, logits) - target * logits).mean())

    weights = np.zeros(design.shape[1])
    for _ in range(100):
        p = _sigmoid(design @ weights)
        gradient = design.T @ (p - target) / len(target)
        if np.abs(gradient).max() < 1e-10:
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design / len(target)
        step = np.linalg.solve(curvature + 1e-12 * np.eye(len(weights)), gradient)
        size, now = 1.0, loss(weights)
        while size > 1e-6 and loss(weights - size * step) > now:  # Newton's step may go too far from a poor start
            size /= 2
        weights = weights - size * step
    return weights
