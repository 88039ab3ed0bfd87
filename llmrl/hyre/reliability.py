"""Whether the probabilities of a weighted ensemble can be believed, before and after some labels.

The probability that the chosen answer of a pair wins is sigmoid(margin), of pairs that share no text with the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.hyre.evaluate import UserPairs, split
from llmrl.hyre.posterior import label_losses, posterior_weights

Array = NDArray[np.float64]


def held_margins(users: Sequence[UserPairs], labels: int, draws: int) -> Array:
    """Return margins of all test pairs of all users and draws, weighted by `labels` labels (loss nll, beta 1)."""
    found = []
    for user in users:
        for draw in range(draws):
            rows, tests = split(user.keys, np.random.default_rng([draw]))
            losses = label_losses(user.margins[rows[:labels]], np.ones(min(labels, len(rows)))).sum(0)
            found.append(user.margins[tests] @ posterior_weights(losses))
    return np.concatenate(found)


def reliability_bins(margins: Any, bins: int = 10) -> tuple[Array, Array, float]:
    """Return mean confidence and accuracy of each bin of equal width from 0.5 to 1 that is not empty, and the ECE.

    Args:
        margins: `[N]`, above 0 where the ensemble is right.
        bins: their number.
    """
    m = np.asarray(margins, np.float64)
    confidence, right = 1 / (1 + np.exp(-np.abs(m))), (m > 0) + 0.5 * (m == 0)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    kept = count > 0
    means = [np.bincount(index, v, bins)[kept] / count[kept] for v in (confidence, right)]
    return means[0], means[1], float((count[kept] / len(m) * np.abs(means[0] - means[1])).sum())


def calibration(users: Sequence[UserPairs], sizes: Sequence[int], draws: int = 20) -> dict[str, dict[str, float]]:
    """Return {n: {"ece", "nll", "brier"}} after n labels of each user; n = 0 is the uniform ensemble.

    Args:
        users: their pairs.
        sizes: numbers of labels.
        draws: of the labels, for each user.
    """
    found = {}
    for n in (0, *sizes):
        margins = held_margins(users, n, draws)
        wrong = 1 / (1 + np.exp(margins))
        found[str(n)] = {
            "ece": reliability_bins(margins)[2],
            "nll": float(np.logaddexp(0, -margins).mean()),
            "brier": float((wrong**2).mean()),
        }
    return found
