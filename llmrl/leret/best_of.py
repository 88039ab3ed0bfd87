"""What more queries a question are worth: the expected best of n of those that were tried, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from llmrl.errors import DataError
from llmrl.intervals import draw_means, interval


def expected_best(values: Sequence[float]) -> list[float]:
    """Return for n = 1, 2, ... the expected greatest of n of the values, drawn without replacement.

    The value with i smaller ones before it, of m, is the greatest of C(i, n - 1) of the C(m, n) subsets of size n. Their
    ratio is n / m for the last value, and (i - n + 1) / i times that of the value behind for each one before it.
    """
    m = len(values)
    n = np.arange(1, m + 1)
    best, weight = np.zeros(m), n / m
    for i, value in reversed(list(enumerate(sorted(values)))):
        best += weight * value
        weight *= np.maximum(i - n + 1, 0) / max(i, 1)
    return best.tolist()


def best_of_curve(
    groups: Iterable[tuple[str, Sequence[float]]], *, draws: int = 2_000, seed: int = 0
) -> list[dict[str, float]]:
    """Return for n = 1, 2, ... the expected best of n queries, averaged over questions, with its 95% interval.

    Args:
        groups: (question id, value of each query that was tried in one state). The states of one question are averaged; a
            state with fewer than n queries counts with the best it has.
        draws: of the bootstrap over questions.
        seed: of the draws.

    Returns:
        {"n", "value", "low", "high"} for each n up to the most queries of any state.

    Raises:
        DataError: there is no query at all.
    """
    curves: dict[str, list[list[float]]] = {}
    for question, values in groups:
        if values:
            curves.setdefault(question, []).append(expected_best(values))
    if not curves:
        raise DataError("no query was tried: expected groups with at least one")
    longest = max(len(curve) for states in curves.values() for curve in states)
    table = np.array([_mean_curve(curves[question], longest) for question in sorted(curves)])
    # one question says nothing about the next
    means = draw_means(table, draws, seed) if len(table) > 1 else np.full((draws, longest), np.nan)
    return [{"n": n + 1, **interval(float(table[:, n].mean()), means[:, n], None, basic=False)} for n in range(longest)]


def _mean_curve(curves: Sequence[list[float]], longest: int) -> list[float]:
    full = [curve + curve[-1:] * (longest - len(curve)) for curve in curves]
    return [math.fsum(column) / len(full) for column in zip(*full, strict=True)]
