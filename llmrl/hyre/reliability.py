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


def held_margins(users: Sequence[UserPairs], labels: int, draws: int, seed: int = 0) -> tuple[Array, Array]:
    """Return margins `[N]` of the test pairs of all users and draws, and their weights, of which each user has the same sum.

    The splits are those of `llmrl.hyre.evaluate.accuracies`; heads are weighted by `labels` labels (loss nll, beta 1).
    """
    found, weights = [], []
    for i, user in enumerate(users):
        for draw in range(draws):
            rows, tests = split(user.keys, np.random.default_rng([seed + i, draw]))
            losses = label_losses(user.margins[rows[:labels]], np.ones(min(labels, len(rows)))).sum(0)
            found.append(user.margins[tests] @ posterior_weights(losses))
            weights.append(np.full(len(tests), 1 / (len(tests) * draws * len(users))))
    return np.concatenate(found), np.concatenate(weights)


def reliability_bins(margins: Any, weights: Any = None, bins: int = 10) -> tuple[Array, Array, float]:
    """Return mean confidence and accuracy of each bin of equal width from 0.5 to 1 that is not empty, and the ECE.

    Args:
        margins: `[N]`, above 0 where the ensemble is right.
        weights: `[N]`, how much each counts; None: all alike.
        bins: their number.
    """
    m = np.asarray(margins, np.float64)
    w = np.ones(len(m)) if weights is None else np.asarray(weights, np.float64)
    confidence, right = 1 / (1 + np.exp(-np.abs(m))), (m > 0) + 0.5 * (m == 0)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    mass = np.bincount(index, w, bins)
    kept = mass > 0
    means = [np.bincount(index, w * v, bins)[kept] / mass[kept] for v in (confidence, right)]
    return means[0], means[1], float((mass[kept] / w.sum() * np.abs(means[0] - means[1])).sum())


def calibration(users: Sequence[UserPairs], sizes: Sequence[int], draws: int, seed: int) -> dict[str, dict[str, float]]:
    """Return {n: {"ece", "nll", "brier"}} after n labels of each user, a mean over users; n = 0 is the uniform ensemble.

    Args:
        users: their pairs.
        sizes: numbers of labels.
        draws, seed: of the labels, for each user, as of `llmrl.hyre.evaluate.table`.
    """
    found = {}
    for n in (0, *sizes):
        margins, weights = held_margins(users, n, draws, seed)
        wrong = 1 / (1 + np.exp(margins))
        found[str(n)] = {
            "ece": reliability_bins(margins, weights)[2],
            "nll": float((weights * np.logaddexp(0, -margins)).sum()),
            "brier": float((weights * wrong**2).sum()),
        }
    return found
