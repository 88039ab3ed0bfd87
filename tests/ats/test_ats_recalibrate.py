import json

import numpy as np
import pytest
from answer_worlds import answers
from sklearn.calibration import CalibratedClassifierCV
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from llmrl.ats.recalibrate import (
    KINDS,
    Recalibration,
    fit_histogram,
    fit_isotonic,
    fit_platt,
    fit_recalibration,
    fit_scaling_binning,
)
from llmrl.errors import DataError

GRID = np.linspace(0, 1, 501)

# HistogramCalibrator, PlattCalibrator, PlattBinnerCalibrator and get_discrete_calibrator of uncertainty-calibration 0.1.4,
# 15 bins, fitted on answers(3000, .15) and applied to the first six of them
HISTOGRAM = [0.565, 0.375, 0.695, 0.495, 0.195, 0.67]
PLATT = [0.573855948277, 0.343489816555, 0.728827060916, 0.487375940516, 0.230551111607, 0.629739831559]
PLATT_BINNER = [0.58313523266, 0.341514207996, 0.714008029979, 0.503709714746, 0.239121781165, 0.624537467603]
BINNED = [0.76609579507, 0.484381796003, 0.871568379135, 0.686255212913, 0.33332947917, 0.802862484426]


# --- isotonic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [15, 2, 1], ids=["distinct", "ties", "many ties"])
@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_fit_isotonic_is_sklearns(tilt, decimals):
    confidence, correct = answers(800, tilt)
    confidence = confidence.round(decimals)
    expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(confidence, correct)
    assert fit_isotonic(confidence, correct)(GRID) == pytest.approx(expected.predict(GRID), abs=1e-12)


def test_fit_isotonic_by_hand():
    # .3 (right) above .5 (wrong): pooled to 1/2
    found = fit_isotonic([0.1, 0.3, 0.5, 0.9], [False, True, False, True])
    assert found([0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 1.0]).tolist() == [0, 0, 0.5, 0.5, 0.5, 0.75, 1]
    assert found.x == (0.1, 0.3, 0.5, 0.9)


def test_fit_isotonic_keeps_few_knots():
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    assert len(fit_isotonic(confidence, rng.random(20_000) < confidence).x) < 300


# --- histogram --------------------------------------------------------------------------------------------------------


def test_fit_histogram_is_uncertainty_calibrations():
    confidence, correct = answers(3000, 0.15)
    assert fit_histogram(confidence, correct)(confidence[:6]) == pytest.approx(HISTOGRAM, abs=1e-12)


def test_fit_histogram_by_hand():
    found = fit_histogram([0.2, 0.4, 0.6, 0.8], [False, True, True, True], bins=2)
    assert (found.x, found.y) == ((0.6,), (0.5, 1.0))
    assert found([0.0, 0.59, 0.6, 1.0]).tolist() == [0.5, 0.5, 1.0, 1.0]


def test_fit_histogram_keeps_ties_in_one_bin():
    confidence = np.array([0.3] * 50 + [0.9] * 10)
    found = fit_histogram(confidence, np.arange(60) % 2 == 0)
    assert found.x == (0.9,)
    assert found([0.3, 0.9]).tolist() == [0.5, 0.5]


# --- Platt ------------------------------------------------------------------------------------------------------------


def test_fit_platt_is_sklearns_sigmoid_calibration():
    confidence, correct = answers(300, 0.3)
    logits = np.log(confidence / (1 - confidence))

    class Logits(LogisticRegression):  # a fitted classifier whose decision function is the logit
        def __init__(self):
            super().__init__()
            self.classes_ = np.array([False, True])

        def fit(self, x, y):
            return self

        def __sklearn_is_fitted__(self):
            return True

        def decision_function(self, x):
            return x[:, 0]

    folds = [(np.arange(300), np.arange(300))]
    sigmoid = CalibratedClassifierCV(Logits(), method="sigmoid", cv=folds).fit(logits[:, None], correct)
    expected = sigmoid.predict_proba(logits[:, None])[:, 1]
    assert fit_platt(confidence, correct)(confidence) == pytest.approx(expected, abs=1e-5)


def test_fit_platt_is_logistic_regression_when_answers_are_many():
    confidence, correct = answers(3000, 0.15)
    found = fit_platt(confidence, correct)
    # its targets are 0 and 1; Platt's keep 1/(number + 2) off them
    assert found(confidence[:6]) == pytest.approx(PLATT, abs=1e-3)


def test_fit_platt_finds_a_known_curve():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=100_000)
    confidence = 1 / (1 + np.exp(-logits))
    found = fit_platt(confidence, rng.random(100_000) < 1 / (1 + np.exp(-(0.5 * logits - 0.8))))
    assert found.slope == pytest.approx(0.5, abs=0.03)
    assert found.intercept == pytest.approx(-0.8, abs=0.03)


def test_fit_platt_of_separated_answers_is_finite():
    found = fit_platt([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    low, high = found([0.1, 0.9])
    assert 0 < low < 0.35
    assert 0.65 < high < 1
    assert np.isfinite([found.slope, found.intercept]).all()


# --- scaling-binning --------------------------------------------------------------------------------------------------


def test_fit_scaling_binning_is_the_authors():
    confidence, correct = answers(3000, 0.15)
    assert fit_scaling_binning(confidence, correct)(confidence[:6]) == pytest.approx(PLATT_BINNER, abs=1e-3)


def test_fit_scaling_binning_of_scaled_confidences_only_bins():
    confidence, correct = answers(3000, 0.15)
    found = fit_scaling_binning(confidence, correct, scaled=True)
    assert found(confidence[:6]) == pytest.approx(BINNED, abs=1e-11)
    assert found.slope is None


def test_fit_scaling_binning_returns_the_mean_of_the_curve_in_each_bin():
    confidence, correct = answers(1500, 0.2)
    found, curve = fit_scaling_binning(confidence, correct, bins=5), fit_platt(confidence, correct)
    order = np.argsort(confidence)
    for part in np.array_split(order, 5):
        assert found(confidence[part]) == pytest.approx(np.full(300, curve(confidence[part]).mean()), rel=1e-12)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_fit_recalibration_lowers_the_error_on_new_answers(kind):
    confidence, correct = answers(6000, 0.4)
    found = fit_recalibration(kind, confidence[:3000], correct[:3000])(confidence[3000:])
    before, after = (np.mean((c - correct[3000:]) ** 2) for c in (confidence[3000:], found))
    assert after < before - 0.05
    assert abs(found.mean() - correct[3000:].mean()) < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("right", [True, False])
def test_fit_recalibration_of_one_class(kind, right):
    found = fit_recalibration(kind, np.linspace(0, 1, 40), np.full(40, right))(GRID)
    assert np.isfinite(found).all()
    assert (np.abs(found - right) < 0.1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fit_recalibration_of_few_answers(kind):
    for count in (1, 2, 4):
        confidence, correct = np.linspace(0.3, 0.9, count), np.arange(count) % 2 == 0
        found = fit_recalibration(kind, confidence, correct)(GRID)
        assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fit_recalibration_of_one_confidence_is_the_accuracy(kind):
    found = fit_recalibration(kind, np.full(2000, 0.7), np.arange(2000) % 4 == 0)
    assert found([0.7]) == pytest.approx([0.25], abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_recalibration_of_certain_answers(kind):
    confidence = np.repeat([0.0, 0.5, 1.0], 100)
    correct = np.concatenate([np.arange(100) < 10, np.arange(100) < 50, np.arange(100) < 80])
    found = fit_recalibration(kind, confidence, correct)([0.0, 1.0])
    assert found == pytest.approx([0.1, 0.8], abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_recalibration_through_json_is_the_same_map(kind):
    found = fit_recalibration(kind, *answers(400, 0.2))
    again = Recalibration.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again == found
    assert again(GRID).tolist() == found(GRID).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_recalibration_keeps_the_order_of_confidences_or_merges_them(kind):
    found = fit_recalibration(kind, *answers(5000, 0.1))(GRID)
    if kind != "histogram":
        assert (np.diff(found) >= 0).all()


def test_recalibration_keeps_the_shape():
    found = fit_platt(*answers(100, 0.1))
    assert found(np.full((2, 3), 0.5)).shape == (2, 3)
    assert found(0.5).shape == ()


def test_recalibration_refuses_what_is_no_confidence():
    found = fit_histogram(*answers(100, 0.1))
    with pytest.raises(DataError, match="got 1 others, the first nan"):
        found([0.5, float("nan")])


@pytest.mark.parametrize("kind", ["isotonik", "temperature"])
def test_fit_recalibration_refuses_an_unknown_kind(kind):
    with pytest.raises(DataError, match=f"unknown kind of recalibration '{kind}'"):
        fit_recalibration(kind, [0.5], [True])


@pytest.mark.parametrize(
    "change", [{"y": [0.5]}, {"x": [0.9, 0.1]}, {"kind": "platt"}, {"slope": 1.0}, {"kind": "steps"}, {"x": None}]
)
def test_recalibration_from_json_refuses_what_is_no_map(change):
    data = {"kind": "histogram", "slope": None, "intercept": None, "x": [0.2, 0.5], "y": [0.1, 0.4, 0.8]}
    Recalibration.from_json(data)
    with pytest.raises(DataError, match="recalibration"):
        Recalibration.from_json({**data, **change})
