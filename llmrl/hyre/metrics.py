"""What an ensemble knows and how much its heads differ, from their margins on pairs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
LEAST_DISAGREEMENT = 0.05  # below it, no weights over the heads change much


def accuracy(margins: ArrayLike) -> Array:
    """Return the share of rows with a margin above 0 along the first axis, a tie counting half: `[N, ...] -> [...]`."""
    m = np.asarray(margins, np.float64)
    return ((m > 0) + 0.5 * (m == 0)).mean(0)


def disagreement(margins: ArrayLike) -> float:
    """Return how often two heads drawn at random prefer different sides, of margins `[N, K]`; 0 for one head.

    With p the share of heads that prefer the first side it is 2 p (1 - p) K / (K - 1), a tie counting half.
    """
    m = np.asarray(margins, np.float64)
    heads = m.shape[1]
    if heads < 2:
        return 0.0
    p = ((m > 0) + 0.5 * (m == 0)).mean(1)
    return float((2 * p * (1 - p)).mean() * heads / (heads - 1))


def collapse_warning(share: float, heads: int, measured_on: str = "held-out") -> str | None:
    """Return what to say of an ensemble whose heads agree, or None.

    Args:
        share: `disagreement` on some pairs.
        heads: K.
        measured_on: which pairs those are.
    """
    if heads < 2:
        return "one head: there is nothing to reweight, adapt will return it unchanged"
    if share >= LEAST_DISAGREEMENT:
        return None
    return (
        f"the {heads} heads disagree on {share:.1%} of {measured_on} pairs, below {LEAST_DISAGREEMENT:.0%}: reweighting them "
        "moves next to nothing\ngive the pairs a 'group' column (who labelled them), or try --diversity cluster or --prior mlp"
    )
