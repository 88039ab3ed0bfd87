"""How far to trust a few labels: beta and loss by leave-one-out, and a guard that falls back to the prior.

All of it works on the losses of labels `[n, K]`, so a choice for thousands of users is array work. The measure is the log
predictive probability of a label under the weights that the *other* labels give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.errors import DataError
from llmrl.hyre.posterior import label_losses, posterior_weights

Array = NDArray[np.float64]
BETAS = (0.1, 0.3, 1.0, 3.0)
DEFAULT = ("nll", 1.0)
LEAST_GUARDED = 3  # labels: of two, each has one other to be predicted by


@dataclass(frozen=True)
class Choice:
    """What was chosen for one user.

    Attributes:
        loss, beta: of `HyrePosterior`. beta 0 is the guard: the prior, whatever the labels.
        guarded: whether the guard decided.
        gain: log predictive a label above the prior's, of the choice before the guard.
        error: standard error of `gain`; None with fewer than two labels.
        scores: log predictive a label of every candidate.
        without_guard: the beta that was chosen before the guard.
    """

    loss: str
    beta: float
    guarded: bool
    gain: float
    error: float | None
    scores: dict[str, float]
    without_guard: float


def leave_one_out(
    losses: ArrayLike, outputs: ArrayLike, targets: ArrayLike, beta: float, prior: ArrayLike | None = None
) -> Array:
    """Return the log predictive of each label, `[n]`, given the others.

    Args:
        losses: `[n, K]` that weigh the heads, from `label_losses`.
        outputs: `[n, K]` margins or logits.
        targets: `[n]`, 1 or 0.
        beta: see `posterior_weights`.
        prior: see `posterior_weights`.
    """
    rows = np.asarray(losses, np.float64)
    weights = posterior_weights(rows.sum(0) - rows, prior, beta)
    f = (np.asarray(outputs, np.float64) * weights).sum(1)
    return -np.logaddexp(0.0, -np.where(np.asarray(targets) == 1, f, -f))


def leave_one_out_squared(
    losses: ArrayLike, outputs: ArrayLike, targets: ArrayLike, beta: float, prior: ArrayLike | None = None
) -> Array:
    """Return minus the squared error of each label, `[n]`, given the others; arguments as of `leave_one_out`."""
    rows = np.asarray(losses, np.float64)
    weights = posterior_weights(rows.sum(0) - rows, prior, beta)
    return -(((np.asarray(outputs, np.float64) * weights).sum(1) - np.asarray(targets, np.float64)) ** 2)


def choose(
    outputs: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    prior: ArrayLike | None = None,
    candidates: tuple[tuple[str, float], ...] | None = None,
    default: tuple[str, float] = DEFAULT,
) -> Choice:
    """Choose loss and beta for one user's labels.

    The default stands unless the best candidate beats it in a paired t test of the labels' log predictives (two-sided, 5%):
    with few labels leave-one-out likes sharp weights, which are worse on new pairs. The guard falls back to the prior
    when the prior alone predicts the labels better than the others do, from three labels on. A guard that asked for more, a
    gain of one standard error, costs users with true labels another point and a half at five labels (docs/hyre.md).

    Args:
        outputs: `[n, K]` margins or logits.
        targets: `[n]`, 1 or 0; without, all 1.
        prior: see `posterior_weights`.
        candidates: (loss, beta); by default nll and zero_one with every beta of BETAS.
        default: what stands with too few labels to choose.

    Raises:
        DataError: no label, something that is not finite, or the squared loss.
    """
    f = np.asarray(outputs, np.float64)
    y = np.ones(len(f)) if targets is None else np.asarray(targets, np.float64)
    if not len(f):
        raise DataError("expected at least one label, got none")
    grid = candidates or tuple((loss, beta) for loss in ("nll", "zero_one") for beta in BETAS)
    if any(loss == "squared" for loss, _ in (default, *grid)):
        raise DataError("choose() is about labels of 0 and 1; of numbers, compare leave_one_out_squared over betas")
    rows = {name: label_losses(f, y, name) for name in {default[0], *(loss for loss, _ in grid)}}
    found = {c: leave_one_out(rows[c[0]], f, y, c[1], prior) for c in dict.fromkeys((default, *grid))}
    before = leave_one_out(rows[default[0]], f, y, 0.0, prior)
    scores = {f"{loss} {beta:g}": float(values.mean()) for (loss, beta), values in found.items()}
    scores["prior"] = float(before.mean())
    best = default
    if len(f) > 1:
        candidate = max(found, key=lambda c: found[c].mean())
        gain, error = _paired(found[candidate], found[default])
        best = candidate if gain > _quantile_of_t(len(f) - 1) * error else default
    if len(f) < 2:  # nothing is left out of one label
        return Choice(*best, False, 0.0, None, scores, best[1])
    gain, error = _paired(found[best], before)
    guarded = gain < 0 and len(f) >= LEAST_GUARDED
    return Choice(best[0], 0.0 if guarded else best[1], guarded, gain, error, scores, best[1])


def _paired(a: Array, b: Array) -> tuple[float, float]:
    difference = a - b
    return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def _quantile_of_t(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t; from 11 degrees of freedom on to 0.02."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[freedom - 1] if freedom <= len(table) else 1.96 + 2.5 / freedom
