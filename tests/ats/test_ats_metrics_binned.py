import numpy as np
import pytest
from answer_worlds import answers

from llmrl.ats.binned import (
    BinSums,
    brier_decomposition,
    checked_answers,
    debiased_calibration_error,
    debiased_squared_error_of,
    equal_mass_edges,
    expected_calibration_error,
)
from llmrl.ats.bootstrap import draw_weights
from llmrl.ats.metrics import Predictions, bootstrap_metrics, compare_methods, point_metrics
from llmrl.errors import DataError
from llmrl.intervals import interval


def predictions(confidence, correct, windows=40):
    tokens = len(confidence)
    return Predictions(confidence, correct, np.zeros(tokens), np.arange(tokens) * windows // tokens)


# --- Brier decomposition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_brier_decomposition_adds_up_exactly(tilt):
    confidence, correct = answers(500, tilt)
    confidence[:2] = 0.0, 1.0
    terms = brier_decomposition(confidence, correct)
    assert terms["brier"] == pytest.approx(np.mean((confidence - correct) ** 2), rel=1e-12)
    classical = terms["reliability"] - terms["resolution"] + terms["uncertainty"]
    within = terms["within_bin_variance"] - terms["within_bin_covariance"]
    assert classical + within == pytest.approx(terms["brier"], rel=1e-12)
    assert abs(within) > 1e-5  # the classical terms alone do not
    generalised = terms["reliability"] - terms["generalised_resolution"] + terms["uncertainty"]
    assert generalised == pytest.approx(terms["brier"], rel=1e-12)


def test_brier_decomposition_by_hand():
    # bins of .5: [.2, .4] with one of two right, [.6, .6] with both; overall accuracy 3/4
    confidence, correct = np.array([0.2, 0.4, 0.6, 0.6]), np.array([False, True, True, True])
    terms = brier_decomposition(confidence, correct, bins=2)
    assert terms["reliability"] == pytest.approx(0.5 * (0.3 - 0.5) ** 2 + 0.5 * (0.6 - 1.0) ** 2)
    assert terms["resolution"] == pytest.approx(0.5 * (0.5 - 0.75) ** 2 + 0.5 * (1.0 - 0.75) ** 2)
    assert terms["uncertainty"] == pytest.approx(0.1875)
    assert terms["within_bin_variance"] == pytest.approx((0.1**2 + 0.1**2) / 4)
    assert terms["within_bin_covariance"] == pytest.approx(2 * (0.1 * 0.5 + 0.1 * 0.5) / 4)


def test_brier_decomposition_of_one_confidence_a_bin_has_no_within_terms():
    confidence = np.repeat([0.1, 0.5, 0.9], 20)
    terms = brier_decomposition(confidence, np.arange(60) % 3 > 0)
    assert terms["within_bin_variance"] == pytest.approx(0.0, abs=1e-15)
    assert terms["within_bin_covariance"] == pytest.approx(0.0, abs=1e-15)
    assert terms["resolution"] == pytest.approx(terms["generalised_resolution"])


def test_point_metrics_reliability_and_resolution_make_up_the_brier_score():
    found = point_metrics(predictions(*answers(700, 0.2)))
    uncertainty = found["accuracy"] * (1 - found["accuracy"])
    assert found["brier_reliability"] - found["brier_resolution"] + uncertainty == pytest.approx(found["brier"])


def test_point_metrics_constant_confidence_has_no_resolution():
    correct = np.arange(100) % 4 > 0
    found = point_metrics(predictions(np.full(100, 0.75), correct))
    assert found["brier_resolution"] == pytest.approx(0.0, abs=1e-12)
    assert found["brier_reliability"] == pytest.approx(0.0, abs=1e-12)


def test_compare_methods_negative_resolution_is_kept():
    # within each bin the more confident half is wrong, the other right: the bins alone have no resolution either
    confidence = np.tile([0.41, 0.45], 300)
    methods, _ = compare_methods({"a": predictions(confidence, confidence < 0.43)}, draws=50)
    score = methods["a"]["brier_resolution"]
    assert score["low"] <= score["value"] == pytest.approx(-0.0004 - 0.02)


# --- debiased calibration error ---------------------------------------------------------------------------------------


# lower_bound_scaling_ce(p=2, debias=True, num_bins=15) of uncertainty-calibration 0.1.4, the authors' package
@pytest.mark.parametrize(
    ("count", "tilt", "value"),
    [
        (600, 0.0, 0.0),
        (600, 0.15, 0.1457475822155197),
        (3000, 0.05, 0.05683769896199243),
        (3000, 0.3, 0.27933077043048454),
        (30000, 0.0, 0.002664904402787291),
    ],
)
def test_debiased_calibration_error_is_the_authors(count, tilt, value):
    assert debiased_calibration_error(*answers(count, tilt)) == pytest.approx(value, rel=1e-9)


def test_debiased_squared_error_by_hand():
    # 4 answers at .7, 3 right; 1 answer at .2, wrong, which is left out
    sums = BinSums(np.array([4.0, 1.0]), np.array([2.8, 0.2]), np.array([3.0, 0.0]))
    assert debiased_squared_error_of(sums) == pytest.approx(4 / 5 * ((0.75 - 0.7) ** 2 - 0.75 * 0.25 / 3))


def test_debiased_squared_error_has_no_bias():
    rng = np.random.default_rng(0)
    count, confidence, accuracy = np.full(15, 20.0), np.linspace(0.1, 0.9, 15), np.linspace(0.15, 0.85, 15)
    right = rng.binomial(20, accuracy, size=(20_000, 15)).astype(float)
    sums = BinSums(np.broadcast_to(count, right.shape), np.broadcast_to(count * confidence, right.shape), right)
    truth = np.mean((accuracy - confidence) ** 2)
    assert debiased_squared_error_of(sums).mean() == pytest.approx(truth, abs=1e-4)
    assert truth < 0.001  # without the correction .0095


@pytest.mark.parametrize(("shift", "tokens"), [(0.01, 3000), (0.03, 3000)])
def test_interval_covers_the_true_debiased_error(shift, tokens):
    """Basic intervals of unmoved draws cover it 50% and 70% of the time."""
    hits, repetitions = 0, 100
    for repetition in range(repetitions):
        rng = np.random.default_rng(repetition)
        confidence = 0.1 + 0.85 * rng.beta(3, 2, tokens)
        p = predictions(confidence, rng.random(tokens) < confidence - shift, windows=50)
        draws = bootstrap_metrics(p, draw_weights(p.window, draws=200, seed=repetition))["ece_debiased"]
        found = interval(debiased_calibration_error(p.confidence, p.correct), draws, basic=False)
        hits += found["low"] <= shift <= found["high"]
    assert hits >= 0.92 * repetitions


def test_compare_methods_interval_of_no_debiased_error_has_a_width():
    confidence, correct = answers(600, 0.0)
    methods, _ = compare_methods({"a": predictions(confidence, correct)}, draws=200)
    assert methods["a"]["ece_debiased"]["value"] == 0.0
    assert methods["a"]["ece_debiased"]["high"] > 0.02


@pytest.mark.parametrize("metric", ["brier_reliability", "brier_resolution"])
def test_bootstrap_brier_terms_are_those_of_the_resampled_tokens(metric):
    p = predictions(*answers(900, 0.1))
    weights = draw_weights(p.window, draws=3, seed=1)
    found = bootstrap_metrics(p, weights)[metric]
    for draw in range(3):
        index = np.repeat(np.arange(900), weights[draw][p.window].astype(int))
        resampled = Predictions(p.confidence[index], p.correct[index], p.nll[index], p.window[index])
        assert found[draw] == pytest.approx(point_metrics(resampled)[metric], rel=1e-9)


# --- bins and checks --------------------------------------------------------------------------------------------------


def test_equal_mass_edges_leave_no_bin_empty():
    for confidence in (np.full(9, 0.4), np.array([0.3] * 50 + [0.9] * 2), np.linspace(0, 1, 4), np.array([0.5])):
        edges = equal_mass_edges(confidence, 15)
        counts = np.bincount(np.searchsorted(edges, confidence, side="right"), minlength=len(edges) + 1)
        assert (counts > 0).all()
    assert len(equal_mass_edges(np.linspace(0, 1, 300), 15)) == 14


def test_checked_answers_clips_rounding_and_takes_integers():
    confidence, correct = checked_answers([1 + 1e-7, 0.5], [1, 0])
    assert confidence.tolist() == [1.0, 0.5]
    assert correct.tolist() == [True, False]
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "one confidence and one right-or-wrong"),
        ([0.5], [True, False], "shapes"),
        ([0.5, float("nan")], [True, False], "in \\[0, 1\\], got 1 others, the first nan"),
        ([0.5, 1.2], [True, False], "the first 1.2"),
        ([0.5, 0.6], [0.5, 1], "booleans"),
    ],
)
def test_checked_answers_refuses(confidence, correct, message):
    with pytest.raises(DataError, match=message):
        checked_answers(confidence, correct)
