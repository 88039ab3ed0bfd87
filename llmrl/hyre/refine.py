"""Fine-tuning that starts at the ensemble's mixture: a linear correction on the base's features, fitted to the same labels.

Of margins m_i = f_w(x_i) + d . x_i it minimises sum_i -log sigmoid(m_i) + l2/2 |d|^2 over d, with x_i the difference of
features of chosen and rejected, in units in which such a difference has a root mean square norm of 1. With few labels the
correction stays small and the mixture decides; with many it does what fine-tuning does, from a better start. It has one
optimum, found in the dual by Newton: d is a sum of the labels' features, so n numbers are solved for, whatever the width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.errors import DataError
from llmrl.hyre.posterior import probabilities

Array = NDArray[np.float64]
DEFAULT_L2 = 0.1
_STEPS, _HALVINGS, _TOLERANCE = 60, 20, 1e-10


def refine(differences: ArrayLike, mixture: ArrayLike, l2: float = DEFAULT_L2, scale: float = 1.0) -> Array:
    """Return the correction d on raw features, `[H]`, or `[..., H]` of many users at once.

    Args:
        differences: `[..., n, H]`, features of the chosen minus those of the rejected.
        mixture: `[..., n]`, margins of the ensemble before the correction.
        l2: strength, in scaled features.
        scale: what features are multiplied by to have the unit above (`llmrl.hyre.fit.feature_scale`).

    Raises:
        DataError: shapes that do not fit, or something that is not finite.
    """
    x = np.asarray(differences, np.float64) * scale
    offset = np.asarray(mixture, np.float64)
    if x.ndim < 2 or offset.shape != x.shape[:-1] or not l2 > 0:
        raise DataError(
            f"expected differences [n, H], margins [n] and l2 above 0, got {x.shape}, {offset.shape} and {l2}"
        )
    if not (np.isfinite(x).all() and np.isfinite(offset).all()):
        raise DataError("features or margins that are not finite: check the base model")
    weights = dual_coefficients(x @ np.swapaxes(x, -1, -2) / l2, offset)
    return scale * (weights[..., None, :] @ x)[..., 0, :] / l2


def dual_coefficients(gram: Array, offset: Array) -> Array:
    """Return a `[..., n]` with a_i = sigmoid(-(offset + G a)_i), where the objective is stationary, by damped Newton.

    Args:
        gram: `[..., n, n]`, inner products of the labels' features over l2.
        offset: `[..., n]`.
    """

    def margins(a: Array) -> Array:
        return offset + (gram @ a[..., None])[..., 0]

    def objective(a: Array) -> Array:
        m = margins(a)
        return np.logaddexp(0.0, -m).sum(-1) + (a * (m - offset)).sum(-1) / 2

    a = np.zeros_like(offset)
    value = objective(a)
    for _ in range(_STEPS):
        p = probabilities(-margins(a))
        jacobian = np.eye(a.shape[-1]) + (p * (1 - p))[..., None] * gram
        step = np.linalg.solve(jacobian, (a - p)[..., None])[..., 0]
        size = np.ones(a.shape[:-1])
        for _ in range(_HALVINGS):
            worse = objective(a - size[..., None] * step) > value + 1e-12
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        a = a - size[..., None] * step
        value = objective(a)
        if np.abs(step).max(initial=0.0) < _TOLERANCE:
            break
    return a
