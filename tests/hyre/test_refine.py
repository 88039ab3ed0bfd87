import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from llmrl.errors import DataError
from llmrl.hyre.refine import refine

RNG = np.random.default_rng(2)


def test_without_a_start_it_is_logistic_regression():
    """scikit-learn needs both classes: a pair turned round is the same label."""
    x = RNG.normal(size=(30, 6))
    turned = np.where(np.arange(30) % 2, 1.0, -1.0)[:, None]
    other = LogisticRegression(C=1 / 0.7, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(
        x * turned, turned[:, 0] > 0
    )
    assert refine(x, np.zeros(30), l2=0.7) == pytest.approx(other.coef_[0], abs=1e-5)


def test_the_gradient_vanishes_with_a_start_and_a_scale():
    x, start, scale, l2 = RNG.normal(size=(12, 40)) * 5, RNG.normal(size=12) * 3, 0.2, 0.3
    d = refine(x, start, l2, scale)
    margins = start + x @ d
    gradient = -(x * scale).T @ (1 / (1 + np.exp(margins))) + l2 * d / scale
    assert np.abs(gradient).max() < 1e-7


def test_many_users_at_once_are_each_as_alone():
    x, start = RNG.normal(size=(5, 8, 20)), RNG.normal(size=(5, 8))
    together = refine(x, start, 0.1)
    for i in range(5):
        assert together[i] == pytest.approx(refine(x[i], start[i], 0.1), abs=1e-8)


def test_hard_labels_converge():
    """Large margins on the wrong side, and features far longer than one: plain Newton steps overshoot there."""
    x, start = RNG.normal(size=(60, 10)) * 30, np.full(60, -40.0)
    d = refine(x, start, 0.01)
    residual = -(x.T @ (1 / (1 + np.exp(np.clip(start + x @ d, -500, 500))))) + 0.01 * d
    assert np.abs(residual).max() < 1e-5


def test_no_correction_where_the_mixture_is_certain():
    assert np.abs(refine(RNG.normal(size=(3, 5)), np.full(3, 50.0))).max() < 1e-12


@pytest.mark.parametrize(
    "arguments", [(np.ones((2, 3)), np.ones(3)), (np.ones((2, 3)), [1.0, np.nan]), (np.ones((2, 3)), np.ones(2), 0.0)]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(DataError):
        refine(*arguments)
