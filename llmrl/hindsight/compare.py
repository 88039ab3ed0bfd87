"""Two policies on the same episodes: common random numbers make the difference of their returns a paired one.

An episode's luck is that of its row and the seed, whoever plays it, so what both met alike cancels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.errors import DataError, UsageError
from llmrl.intervals import draw_means, interval

_SAME = ("env", "variant", "user", "user_model", "seed", "episodes")
_DRAWS = 5000


def paired_difference(returns: Sequence[float], others: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Return the mean of `returns - others`, its 95% bootstrap interval over episodes, and `p` of a paired test.

    p is two-sided, of flipping the signs of the differences at random: how often equal policies would differ so much.

    Args:
        returns, others: of the same episodes in the same order.
        seed: of both.

    Raises:
        DataError: they are not of as many episodes.
    """
    if len(returns) != len(others) or not len(returns):
        raise DataError(f"expected returns of the same episodes, got {len(returns)} and {len(others)}")
    difference: NDArray[np.float64] = np.asarray(returns, float) - np.asarray(others, float)
    means = draw_means(difference[:, None], _DRAWS, seed)[:, 0]
    found = interval(float(difference.mean()), means, None, basic=False)
    return {**found, "p": sign_flip_p(difference, seed)}


def sign_flip_p(difference: NDArray[np.float64], seed: int) -> float:
    """Return the share of random signs under which the mean is at least as far from 0, the observed one counted in."""
    from scipy.stats import permutation_test

    if not difference.any():
        return 1.0
    result = permutation_test(
        (difference,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=_DRAWS, vectorized=True,
        rng=np.random.default_rng(seed), batch=500,
    )  # fmt: skip
    return float(result.pvalue)


def read_report(folder: Path | str) -> dict[str, Any]:
    """Return the report of `llmrl hindsight eval` in a folder.

    Raises:
        UsageError: there is none.
    """
    path = Path(folder).expanduser() / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = {name: report[name] for name in (*_SAME, "returns", "policy")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"--against {folder}: expected a folder of llmrl hindsight eval ({type(error).__name__}: {error})"
        ) from None
    return found


def check_same(report: dict[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report of the same episodes as those that will be played.

    Raises:
        UsageError: it was made with another world, seed or number of episodes.
    """
    other = [f"{name} {report[name]} and {wanted[name]}" for name in _SAME if report[name] != wanted[name]]
    if other:
        raise UsageError(f"--against compares the same episodes, but the two runs differ in {', '.join(other)}")
    return report
