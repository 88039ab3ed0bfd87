"""Bootstrap of independent units: how often each is drawn, means under every draw, 95% intervals.

A unit is what was sampled on its own: a question, a window of text. Two systems scored on the same units share the draws,
which makes their difference paired: what the units have in common cancels.

An interval is basic, [2v - high, 2v - low] of the percentiles, or the percentiles themselves. Resampling adds noise that
lifts a statistic such as a calibration error, as sampling has lifted the estimate v itself; the basic interval takes that
bias off, where the percentile interval doubles it. A mean has no such bias, and its percentiles stay inside its range.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_BLOCK = 1 << 22  # cells of drawn counts held at a time (32 MB), however many units there are


def draw_counts(units: int, draws: int, seed: int) -> Array:
    """Return how often each unit is drawn, `[draws, units]`; each row sums to `units`."""
    rng = np.random.default_rng(seed)
    return _counts(rng, units, draws)


def draw_means(values: Array, draws: int, seed: int) -> Array:
    """Return the mean of each column under every draw, `[draws, columns]`, of `values` `[units, columns]`.

    The draws are those of `draw_counts`, held a block at a time.
    """
    units, rng = len(values), np.random.default_rng(seed)
    size = max(1, _BLOCK // units)
    blocks = [_counts(rng, units, min(size, draws - start)) @ values / units for start in range(0, draws, size)]
    return np.concatenate(blocks)


def draw_means_within(values: Array, groups: Sequence[int], draws: int, seed: int) -> Array:
    """Return the mean under every draw, `[draws]`, of `values` `[units]`, where each group is drawn anew within itself.

    For units that are a fixed set of kinds, each met several times: the set is not left to luck, only what happened in it.
    """
    rng, total, which = np.random.default_rng(seed), np.zeros(draws), np.asarray(groups)
    for group in np.unique(which):
        own = values[which == group]
        total += _counts(rng, len(own), draws) @ own
    return total / len(values)


def _counts(rng: np.random.Generator, units: int, draws: int) -> Array:
    return rng.multinomial(units, np.full(units, 1.0 / units), size=draws).astype(np.float64)


def interval(
    value: float, draws: Array, floor: float | None = 0.0, ceiling: float | None = None, *, basic: bool = True
) -> dict[str, float]:
    """Return `value` with its 95% bootstrap interval, widened to hold `value`, cut at `floor` and `ceiling`.

    Args:
        value: the estimate on the whole sample.
        draws: `[draws]`, the estimate under each draw; those that are not finite are left out.
        floor: least value the quantity can have, None for no limit.
        ceiling: greatest value.
        basic: mirror the percentiles on `value`; False for draws that are free of the bias described above.
    """
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0 or not np.isfinite(value):
        return {"value": value, "low": float("nan"), "high": float("nan")}
    lower, upper = np.percentile(finite, [2.5, 97.5]).tolist()
    if basic:
        lower, upper = 2 * value - upper, 2 * value - lower
    low, high = min(value, lower), max(value, upper)
    return {
        "value": value,
        "low": low if floor is None else max(floor, low),
        "high": high if ceiling is None else min(ceiling, high),
    }
