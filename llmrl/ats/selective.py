"""Selective prediction: answer when confidence is high enough, and know the error of what is answered.

Coverage is the share of answers given, risk the error rate among them. Answers must be exchangeable with those to come: one
per question, drawn as future questions will be. Tokens of one text are not; score whole answers, or take one token a text.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.ats.binned import checked_answers
from llmrl.errors import UsageError

Array = NDArray[np.float64]
_STEPS = 100  # thresholds tried, in steps of coverage
_FIRST_COVERAGE = 0.1
_FIRST_ERRORS = 2  # as many errors the first test must be able to forgive


# --- risk and coverage ------------------------------------------------------------------------------------------------


def _groups(confidence: Array, correct: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    # distinct confidences, highest first, with their numbers of answers and of wrong ones
    values, inverse, count = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(inverse, weights=~correct, minlength=len(values)).astype(np.float64)
    return -values, count.astype(np.float64), wrong


def aurc(confidence: Array, correct: NDArray[np.bool_]) -> float:
    """Return the area under the risk-coverage curve: the mean over k of the error of the k most confident answers.

    Equal confidences stand in random order, and the mean over those orders is returned. Source: Geifman and El-Yaniv 2017;
    Geifman, Uziel and El-Yaniv 2019 (arXiv 1805.08206).
    """
    _, count, wrong = _groups(confidence, correct)
    return float(aurc_of(count, wrong))


def aurc_of(count: Array, wrong: Array) -> Array:
    """Return `[...]`: AURC of groups of equal confidence, highest first, given `[..., groups]` answers and errors.

    With n answers and w errors before a group of m answers at error rate r, the group's expected risks are
    (w + j r) / (n + j) for j = 1..m. They sum to (w - n r)(H(n + m) - H(n)) + m r, with harmonic numbers H.
    """
    after = np.cumsum(count, axis=-1)
    before, wrong_before = after - count, np.cumsum(wrong, axis=-1) - wrong
    rate = np.divide(wrong, count, out=np.zeros_like(wrong), where=count > 0)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(after.max()) + 1))])
    steps = harmonic[after.astype(np.int64)] - harmonic[before.astype(np.int64)]
    return ((wrong_before - before * rate) * steps + count * rate).sum(-1) / after[..., -1]


def risk_at_coverage(confidence: ArrayLike, correct: ArrayLike, coverage: float) -> float:
    """Return the error among the most confident `coverage` of the answers, ties in random order (expected value).

    Raises:
        UsageError: coverage outside (0, 1].
    """
    if not 0 < coverage <= 1:
        raise UsageError(f"expected a coverage above 0 and at most 1, got {coverage}")
    _, count, wrong = _groups(*checked_answers(confidence, correct))
    answered, errors = np.cumsum(count), np.cumsum(wrong)
    wanted = max(1, math.ceil(coverage * answered[-1] - 1e-9))
    last = int(np.searchsorted(answered, wanted))
    spare = answered[last] - wanted
    return float((errors[last] - spare * wrong[last] / count[last]) / wanted)


def risk_coverage_curve(confidence: ArrayLike, correct: ArrayLike, points: int = 200) -> dict[str, list[float]]:
    """Return threshold, coverage and risk of "answer when confidence >= threshold", most confident first.

    One entry per distinct confidence, or `points` of them spread evenly over coverage where there are more.
    """
    values, count, wrong = _groups(*checked_answers(confidence, correct))
    answered, errors = np.cumsum(count), np.cumsum(wrong)
    if len(values) > points:
        wanted = answered[-1] * np.arange(1, points + 1) / points
        kept = np.unique(np.minimum(np.searchsorted(answered, wanted), len(values) - 1))
        values, answered, errors = values[kept], answered[kept], errors[kept]
    return {
        "threshold": values.tolist(),
        "coverage": (answered / answered[-1]).tolist(),
        "risk": (errors / answered).tolist(),
    }


# --- a threshold with a guarantee -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorThreshold:
    """The answer of `threshold_for_error`; JSON through `dataclasses.asdict`.

    Attributes:
        threshold: answer when confidence >= threshold; None where no threshold keeps the target.
        coverage: share of the given answers at or above the threshold, 0 without one.
        error: observed error among those, None without a threshold.
        target_error: what the error of future answers stays below,
        delta: but for this probability.
        answers: number of answers it was found on.
    """

    threshold: float | None
    coverage: float
    error: float | None
    target_error: float
    delta: float
    answers: int


def threshold_for_error(
    confidence: ArrayLike,
    correct: ArrayLike,
    target_error: float,
    delta: float = 0.05,
    *,
    thresholds: ArrayLike | None = None,
) -> ErrorThreshold:
    """Return the lowest threshold whose answers are wrong at most `target_error` of the time, with probability 1 - delta.

    The number of errors among the answers above a threshold that was fixed beforehand is binomial, so the exact test of
    Clopper and Pearson says at level delta whether the error there is below the target. To run it at many thresholds and
    keep the lowest that passes is not valid: each is one more chance to pass by luck, and the luckiest is what is kept.
    Here the thresholds are tested from the most confident down, and the first failure ends it. To return too low a
    threshold, the test must pass at the first threshold whose error is above the target, and that one test does so with
    probability at most delta: nothing is lost to the number of thresholds (fixed sequence testing, in Angelopoulos et al.
    2021, "Learn then Test", arXiv 2110.01052).

    By default the thresholds are the 10%, 11%, ... 100% most confident of these answers, the first as many as it takes to
    forgive two errors. They come from the data, so it is assumed that once the error of the answered part has risen above the
    target, it does not sink below it again at lower thresholds. `thresholds` needs no such assumption.

    Args:
        confidence: `[N]`, one per answer; answers exchangeable with those to come.
        correct: `[N]`.
        target_error: error rate to stay at or below, in (0, 1).
        delta: probability of exceeding it, in (0, 1).
        thresholds: fixed without these answers, such as quantiles of the confidence on other data; any order.

    Raises:
        UsageError: target_error or delta outside (0, 1).
        DataError: no answers, or values that are no confidences.
    """
    for name, value in (("target_error", target_error), ("delta", delta)):
        if not 0 < value < 1:
            raise UsageError(f"expected {name} between 0 and 1, got {value}")
    values, right = checked_answers(confidence, correct)
    order = np.argsort(-values, kind="stable")
    values, errors = values[order], np.concatenate([[0], np.cumsum(~right[order])])
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(values) + 1)))])
    if thresholds is None:
        sequence = _thresholds_by_coverage(values, target_error, delta, log_factorial)
    else:
        sequence = np.unique(np.asarray(thresholds, dtype=np.float64))[::-1]
    passed = None
    for threshold in sequence.tolist():
        answered = int(np.searchsorted(-values, -threshold, side="right"))
        if binomial_cdf(int(errors[answered]), answered, target_error, log_factorial) > delta:
            break
        passed = (threshold, answered)
    if passed is None:
        return ErrorThreshold(None, 0.0, None, target_error, delta, len(values))
    threshold, answered = passed
    error = float(errors[answered] / answered)
    return ErrorThreshold(threshold, answered / len(values), error, target_error, delta, len(values))


def _thresholds_by_coverage(descending: Array, target_error: float, delta: float, log_factorial: Array) -> Array:
    total = len(descending)

    def forgives(n: int) -> bool:
        return binomial_cdf(_FIRST_ERRORS, n, target_error, log_factorial) <= delta

    enough = bisect_left(range(1, total + 1), True, key=forgives) + 1
    first = min(total, max(enough, math.ceil(_FIRST_COVERAGE * total)))
    sizes = np.ceil(total * np.arange(1, _STEPS + 1) / _STEPS - 1e-9).astype(np.int64)
    sizes = np.concatenate([[first], sizes[sizes > first]])
    return np.unique(descending[sizes - 1])[::-1]


def binomial_cdf(k: int, n: int, p: float, log_factorial: Array | None = None) -> float:
    """Return P(X <= k) of X ~ Binomial(n, p), 0 < p < 1; 1 - delta confidence that the rate is below p when <= delta.

    Args:
        k: number of errors.
        n: number of answers.
        p: error rate.
        log_factorial: log(0!), log(1!), ... up to n at least, for many calls.
    """
    if k >= n:
        return 1.0
    table = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))]) if log_factorial is None else log_factorial
    j = np.arange(k + 1)
    log_terms = table[n] - table[j] - table[n - j] + j * math.log(p) + (n - j) * math.log1p(-p)
    top = float(log_terms.max())
    return min(1.0, math.exp(top) * float(np.exp(log_terms - top).sum()))
