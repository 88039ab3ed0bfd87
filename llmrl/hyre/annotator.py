"""Simulated users: what a criterion of `llmrl.hyre.acquire` is worth, measured on users whose preferences are known.

All users of a simulation go through their queries at once: a step is a few products of arrays, whatever the number of users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.errors import DataError
from llmrl.hyre.acquire import scores
from llmrl.hyre.posterior import label_losses, posterior_weights, probabilities

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Annotator:
    """One user, or several, who answer with mistakes.

    Attributes:
        margins: `[..., N]`, by how much the first answer of each pair is better for the user; below 0 the second is. Where
            only the side is known, 1 and -1 will do. A margin of 0 is answered by a coin.
        flip: probability that an answer is turned round, whatever the pair.
        scale: None answers by the sign of the margin; a number draws the answer by Bradley and Terry, the first one with
            probability sigmoid(scale * margin), so that close pairs are answered at random and clear ones are not.
        seed: of the mistakes. Each pair has one answer, whenever it is asked: criteria are compared on the same mistakes.
    """

    margins: ArrayLike
    flip: float = 0.0
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1 or (self.scale is not None and not self.scale >= 0):
            raise DataError(
                f"expected flip from 0 to 1 and scale None or not below 0, got {self.flip} and {self.scale}"
            )
        if not np.isfinite(np.asarray(self.margins, np.float64)).all():
            raise DataError("expected margins that are finite numbers")

    def labels(self) -> Array:
        """Return the answer to every pair, `[..., N]`: 1 the first is better, 0 the second."""
        m = np.asarray(self.margins, np.float64)
        rng = np.random.default_rng(self.seed)
        drawn, turned = rng.random(m.shape), rng.random(m.shape)
        first = (np.sign(m) + 1) / 2 if self.scale is None else probabilities(self.scale * m)
        return np.asarray((drawn < first) != (turned < self.flip), np.float64)


@dataclass(frozen=True)
class Curve:
    """How users fared, query by query.

    Attributes:
        accuracy: `[..., n + 1]` on the test set, after 0, 1, ..., n labels.
        asked: `[..., n]`, the pairs asked, in order.
        weights: `[..., n + 1, K]`, the posterior after each.
    """

    accuracy: Array
    asked: NDArray[np.int64]
    weights: Array


def query_curve(
    margins: ArrayLike,
    labels: ArrayLike,
    test_margins: ArrayLike,
    test_truth: ArrayLike,
    *,
    criterion: str,
    queries: int,
    beta: float = 1.0,
    loss: str = "nll",
    prior: ArrayLike | None = None,
    seed: int = 0,
) -> Curve:
    """Let users answer `queries` questions, each chosen by a criterion from the answers before it.

    Args:
        margins: `[N, K]` of the pool, or `[..., N, K]`, a pool each.
        labels: `[..., N]`, 1 or 0, see `Annotator.labels`; its leading axes are the users.
        test_margins: `[T, K]` or `[..., T, K]`.
        test_truth: `[..., T]`, true margins or sides of the test pairs; above 0 the first is better. A predicted margin of 0
            counts half.
        criterion: one of `llmrl.hyre.acquire.CRITERIA`.
        queries: n, at most N; no pair is asked twice.
        beta, loss, prior: of the posterior.
        seed: of "random": every user has an order of their own.

    Raises:
        DataError: more queries than pairs, shapes that do not fit, labels that are not 1 or 0, or a true margin of 0.
    """
    f, y = np.asarray(margins, np.float64), np.asarray(labels, np.float64)
    test, truth = np.asarray(test_margins, np.float64), np.asarray(test_truth, np.float64)
    _check(f, y, test, truth, queries)
    users, (pairs, heads) = y.shape[:-1], f.shape[-2:]
    flat_y = y.reshape(-1, pairs)
    rows = np.arange(len(flat_y))
    # [pool, N, K] of label 0 and of label 1; `pool` is 1 where all users share theirs
    own = f.reshape(-1, pairs, heads)
    which = rows if len(own) > 1 else np.zeros_like(rows)
    losses = np.stack([label_losses(own, np.full(own.shape[:-1], label), loss) for label in (0.0, 1.0)])
    total = np.zeros((len(rows), heads))
    taken = np.zeros((len(rows), pairs), bool)
    weights, asked = [posterior_weights(total, prior, beta)], []
    for _ in range(queries):
        worth = scores(criterion, own if len(own) > 1 else own[0], weights[-1], beta=beta, loss=loss, seed=seed)
        best = np.where(taken, -np.inf, worth).argmax(-1)
        taken[rows, best] = True
        total = total + losses[flat_y[rows, best].astype(int), which, best]
        asked.append(best)
        weights.append(posterior_weights(total, prior, beta))
    found = np.stack(weights, 1).reshape(*users, queries + 1, heads)
    order = np.asarray(asked, np.int64).reshape(queries, len(rows)).T.reshape(*users, queries)
    return Curve(_accuracy(test, truth, found), order, found)


def _accuracy(test: Array, truth: Array, weights: Array) -> Array:
    """Return `[..., n + 1]` of margins `[..., T, K]`, truth `[..., T]` and weights `[..., n + 1, K]`."""
    right = np.matmul(weights, np.swapaxes(test, -1, -2)) * np.sign(truth)[..., None, :]
    return np.asarray(((right > 0) + 0.5 * (right == 0)).mean(-1))


def _check(f: Array, y: Array, test: Array, truth: Array, queries: int) -> None:
    users = y.shape[:-1]
    fits = (
        f.ndim >= 2
        and f.shape[:-2] in ((), users)
        and y.shape[-1:] == f.shape[-2:-1]
        and test.ndim >= 2
        and test.shape[:-2] in ((), users)
        and truth.shape == (*users, test.shape[-2])
        and test.shape[-1] == f.shape[-1]
    )
    if not fits:
        raise DataError(
            "expected margins [N, K] or [..., N, K], labels [..., N], test margins [T, K] or [..., T, K] and truth [..., T], "
            f"got {list(f.shape)}, {list(y.shape)}, {list(test.shape)} and {list(truth.shape)}"
        )
    if not 0 <= queries <= f.shape[-2]:
        raise DataError(f"expected 0 to {f.shape[-2]} queries, as many as the pool has pairs, got {queries}")
    if not ((y == 0) | (y == 1)).all():
        raise DataError("expected labels of 1 and 0")
    if not np.isfinite(truth).all() or not truth.all():
        raise DataError("a test pair has no better side: leave out those with a true margin of 0")
