import math

import numpy as np
import pytest

from llmrl import intervals
from llmrl.intervals import draw_counts, draw_means, draw_means_within, interval


def test_draw_counts_resamples_all_units_each_time():
    counts = draw_counts(7, draws=50, seed=0)
    assert counts.shape == (50, 7)
    assert (counts.sum(1) == 7).all()
    assert (counts == draw_counts(7, draws=50, seed=0)).all()
    assert (counts != draw_counts(7, draws=50, seed=1)).any()


def test_draw_counts_have_the_moments_of_drawing_with_replacement():
    counts = draw_counts(10, draws=40_000, seed=3)
    np.testing.assert_allclose(counts.mean(0), 1.0, atol=0.02)
    np.testing.assert_allclose(counts.var(0), 1 - 1 / 10, atol=0.03)  # binomial(10, 1/10)


@pytest.mark.parametrize("block", [1, 64, 1 << 22])
def test_draw_means_are_means_of_the_resampled_rows_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(intervals, "_BLOCK", block)
    values = np.random.default_rng(0).normal(size=(11, 3))
    counts = draw_counts(11, draws=43, seed=5).astype(int)
    expected = [np.repeat(values, row, axis=0).mean(0) for row in counts]
    np.testing.assert_allclose(draw_means(values, draws=43, seed=5), expected, rtol=0, atol=1e-14)


def test_interval_takes_the_percentiles_when_not_basic():
    found = interval(0.4, np.linspace(0.0, 1.0, 101), floor=None, basic=False)
    assert found == {"value": 0.4, "low": pytest.approx(0.025), "high": pytest.approx(0.975)}


def test_interval_mirrors_the_percentiles_on_the_value_and_skips_nan_draws():
    draws = np.concatenate([np.linspace(0.0, 1.0, 101), [np.nan] * 5])
    found = interval(0.4, draws, floor=None)
    assert found["low"] == pytest.approx(2 * 0.4 - 0.975)
    assert found["high"] == pytest.approx(2 * 0.4 - 0.025)
    assert interval(0.4, draws)["low"] == 0.0
    assert interval(0.6, draws)["high"] == pytest.approx(1.175)
    assert interval(0.6, draws, ceiling=1.0)["high"] == 1.0


@pytest.mark.parametrize("value", [0.1, 0.9])
def test_interval_is_widened_to_hold_its_value(value):
    draws = np.linspace(0.4, 0.6, 101)
    found = interval(value, draws, floor=None)
    # all draws lie on one side of the value, so their mirror image does too
    if value < 0.4:
        assert (found["high"], found["low"]) == (value, pytest.approx(2 * value - 0.595))
    else:
        assert (found["low"], found["high"]) == (value, pytest.approx(2 * value - 0.405))


def test_interval_without_finite_draws_is_nan():
    assert math.isnan(interval(0.5, np.array([np.nan]))["low"])
    assert math.isnan(interval(float("nan"), np.array([0.1, 0.2]))["high"])


def test_means_within_groups_leave_the_groups_as_they_are():
    """Two starts, each met often: how often is not left to luck, and a start where nothing varies adds nothing."""
    values, groups = np.array([0.0, 1.0] * 50 + [5.0] * 100), [0] * 100 + [1] * 100
    drawn = draw_means_within(values, groups, 4000, 0)
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.005)
    assert drawn.std() == pytest.approx(0.5 * 0.5 / 10, rel=0.1)  # half of the mean, of deviation .5 over 100 units
    assert draw_means(values[:, None], 4000, 0).std() > 5 * drawn.std()
    assert set(draw_means_within(np.ones(6), [0, 0, 1, 1, 2, 2], 10, 0)) == {1.0}
