"""Which pair to ask next: what a label is expected to say, from the heads' margins and the weights so far. Only numpy.

Head k gives a pair the margin f_k and says with probability p_k = sigmoid(f_k) that the first answer is preferred; w is the
posterior over heads, H the entropy in nats. A criterion gives every pair a number that is not negative, higher for a better
question (only "information" can fall below 0, see there):

    random             a fixed draw from [0, 1): sorting by it is a random order
    entropy            H[sum_k w_k p_k]: how unsure the ensemble is
    bald               H[sum_k w_k p_k] - sum_k w_k H[p_k]: how much of that is disagreement between heads
    variance           variance of f_k over heads, each counting alike
    weighted_variance  the same under w
    margin             sigmoid(-|sum_k w_k f_k|): the probability of the less likely side, highest where the margin is smallest
    information        expected drop of H[w] when the label comes, through the very update of `llmrl.hyre.posterior`

With the loss nll and beta 1 the update is Bayes' rule, and "information" equals "bald". With another beta or loss the
likelihoods of the two labels do not sum to 1; then the drop is of the weights the posterior would really take, averaged over
labels that come with the probability sum_k w_k p_k. It may be negative: a label that the favoured heads did not expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.errors import DataError, did_you_mean
from llmrl.hyre.posterior import entropy, label_losses, probabilities

Array = NDArray[np.float64]
CRITERIA = ("random", "entropy", "bald", "variance", "weighted_variance", "margin", "information")
STOP_WINDOW, STOP_SHARE = 5, 0.01
_LEAST_NOVELTY = 1e-9  # above 0: pairs that repeat the picked ones come last, in the order of the criterion


def scores(
    criterion: str,
    margins: ArrayLike,
    weights: ArrayLike,
    *,
    beta: float = 1.0,
    loss: str = "nll",
    seed: int = 0,
) -> Array:
    """Return how good a question each pair is, `[..., N]`.

    Args:
        criterion: one of CRITERIA.
        margins: `[..., N, K]`, one pool for all users or one each.
        weights: `[..., K]`, of one user or of many; leading axes are broadcast.
        beta, loss: of the posterior's update, for "information"; the loss is "nll" or "zero_one".
        seed: of "random". The same seed gives the same order, whatever the weights, so a session can be taken up again.

    Raises:
        DataError: an unknown criterion or loss, shapes that do not fit, or something that is not finite.
    """
    f, w = np.asarray(margins, np.float64), np.asarray(weights, np.float64)
    if criterion not in CRITERIA:
        raise DataError(f"unknown criterion '{criterion}'{did_you_mean(criterion, CRITERIA)}")
    if f.ndim < 2 or w.ndim < 1 or f.shape[-1] != w.shape[-1]:
        raise DataError(f"expected margins [..., N, K] and weights [..., K], got {list(f.shape)} and {list(w.shape)}")
    if not (np.isfinite(f).all() and np.isfinite(w).all()):
        raise DataError("margins or weights that are not finite: check the model")
    lead = np.broadcast_shapes(f.shape[:-2], w.shape[:-1])
    if criterion == "random":
        return np.random.default_rng(seed).random((*lead, f.shape[-2]))
    if criterion == "information":
        return _information(f, w, beta, loss)
    return np.broadcast_to(_BY_NAME[criterion](f, w), (*lead, f.shape[-2])).copy()


def choose_batch(
    criterion: str,
    margins: ArrayLike,
    weights: ArrayLike,
    size: int,
    *,
    taken: Iterable[int] = (),
    beta: float = 1.0,
    loss: str = "nll",
    seed: int = 0,
) -> NDArray[np.int64]:
    """Return the pairs to ask before the weights are looked at again, best first; as many as are left, if fewer.

    Two pairs tell the same about the heads when the same heads win on both, whatever the pairs say: when their margins,
    as functions of the head, are correlated by 1 or -1 under the weights. So pairs are picked one by one, and the score of
    each is multiplied by its novelty: the share of its variance over heads that a linear regression on the margins of those
    picked before leaves unexplained, 1 - R^2. The first is always the best by the criterion alone, a copy of a picked pair
    (or the same pair with its sides swapped) has novelty 0 and comes last, and between them the score decides.

    Args:
        criterion: see `scores`.
        margins: `[N, K]`.
        weights: `[K]`.
        size: how many.
        taken: pairs that are not to be asked: those labelled or skipped.
        beta, loss, seed: see `scores`.

    Raises:
        DataError: see `scores`.
    """
    f, w = np.asarray(margins, np.float64), np.asarray(weights, np.float64)
    if f.ndim != 2 or w.ndim != 1:
        raise DataError(f"expected margins [N, K] and weights [K], got {list(f.shape)} and {list(w.shape)}")
    worth = scores(criterion, f, w, beta=beta, loss=loss, seed=seed)
    worth = worth - min(float(worth.min(initial=0.0)), 0.0)
    left = np.ones(len(f), bool)
    left[list(taken)] = False
    size = min(size, int(left.sum()))
    # rows of length 1 whose products are the correlations under w; what earlier picks explain is taken out one by one
    rest = _standardised(f, w) if size > 1 else f
    novelty = np.ones(len(f))
    picked: list[int] = []
    while len(picked) < size:
        best = int(np.where(left, worth * novelty, -1.0).argmax())
        picked.append(best)
        left[best] = False
        if len(picked) < size:
            rest = _without(rest, rest[best])
            novelty = np.maximum((rest**2).sum(1), _LEAST_NOVELTY)
    return np.asarray(picked, np.int64)


def should_stop(
    margins: ArrayLike, weights: ArrayLike, *, window: int = STOP_WINDOW, share: float = STOP_SHARE
) -> bool:
    """Tell whether labels have stopped to change what is decided about the pool.

    They have when the sides that the present weights take on the pool differ from those of each of the last `window` steps
    on at most `share` of its pairs. That is in the unit a user cares for, decisions; a threshold in nats on the information
    of the best question would stop before the first one where heads have small margins. Nothing stops before `window` labels.

    Args:
        margins: `[N, K]` of the pool, labelled pairs included.
        weights: `[n + 1, K]`, after 0, 1, ..., n labels.
        window: how many labels must have changed nothing.
        share: what counts as nothing.

    Raises:
        DataError: shapes that do not fit, a window below 1, or no pair.
    """
    f, w = np.asarray(margins, np.float64), np.asarray(weights, np.float64)
    if f.ndim != 2 or w.ndim != 2 or f.shape[1] != w.shape[1] or not len(f) or window < 1:
        raise DataError(
            f"expected margins [N, K], weights [n + 1, K] and a window of at least 1, got {list(f.shape)}, {list(w.shape)} "
            f"and {window}"
        )
    if len(w) <= window:
        return False
    sides = np.sign(w[-window - 1 :] @ f.T)
    return bool(((sides[:-1] != sides[-1]).mean(1) <= share).all())


def _standardised(f: Array, w: Array) -> Array:
    spread = (f - (f @ w)[:, None]) * np.sqrt(w)
    length = np.sqrt((spread**2).sum(1, keepdims=True))
    return np.divide(spread, length, out=np.zeros_like(spread), where=length > 0)


def _without(rows: Array, direction: Array) -> Array:
    length = float(np.linalg.norm(direction))
    if length < 1e-6:  # rounding is all that is left of it
        return rows
    unit = direction / length
    return rows - (rows @ unit)[:, None] * unit


def _mean(values: Array, weights: Array) -> Array:
    """Return sum_k w_k v_k, `[..., N]`, of `[..., N, K]` and `[..., K]`."""
    return np.asarray(np.matmul(values, weights[..., None])[..., 0])


def _x_log_x(x: Array) -> Array:
    return x * np.log(np.where(x > 0, x, 1.0))


def _entropy(f: Array, w: Array) -> Array:
    # from the less likely side, which is averaged by itself: 1 - p would lose a probability below 1e-16
    less = np.minimum(_mean(probabilities(f), w), _mean(probabilities(-f), w))
    return -_x_log_x(less) - (1 - less) * np.log1p(-less)


def _bald(f: Array, w: Array) -> Array:
    size = np.abs(f)
    own = np.logaddexp(0.0, -size) + size * probabilities(-size)  # H[sigmoid(f)]
    return np.maximum(_entropy(f, w) - _mean(own, w), 0.0)


def _weighted_variance(f: Array, w: Array) -> Array:
    return _mean((f - _mean(f, w)[..., None]) ** 2, w)


_BY_NAME: dict[str, Callable[[Array, Array], Array]] = {
    "entropy": _entropy,
    "bald": _bald,
    "variance": lambda f, w: f.var(-1),
    "weighted_variance": _weighted_variance,
    "margin": lambda f, w: probabilities(-np.abs(_mean(f, w))),
}


def _information(f: Array, w: Array, beta: float, loss: str) -> Array:
    """H[w] - sum_y p(y) H[w given y].

    With a_k = exp(-beta loss_k(y)) and Z = sum_k w_k a_k the new weights are w_k a_k / Z, and their entropy is
    log Z - sum_k w_k a_k (log w_k + log a_k) / Z: four products of a matrix and a vector, however many users.
    """
    if loss not in ("nll", "zero_one"):
        raise DataError(f"expected the loss nll or zero_one for the criterion information, got {loss!r}")
    before = np.asarray(entropy(w))[..., None]
    w_log_w = _x_log_x(w)
    found: Array = np.zeros(())
    for label, signed in ((1.0, f), (0.0, -f)):
        logs = -beta * label_losses(f, np.full(f.shape[:-1], label), loss)
        logs = logs - logs.max(-1, keepdims=True)
        a = np.exp(logs)
        total = _mean(a, w)
        possible = total > 0  # else the label's probability is 0 too
        safe = np.where(possible, total, 1.0)
        after = np.log(safe) - (_mean(a, w_log_w) + _mean(a * logs, w)) / safe
        found = found + _mean(probabilities(signed), w) * np.where(possible, before - after, 0.0)
    return found
