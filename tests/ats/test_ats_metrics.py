import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from llmrl.ats import bootstrap
from llmrl.ats.metrics import (
    METRICS,
    MIN_CLUSTERS,
    Predictions,
    auroc,
    bootstrap_metrics,
    calibration_error,
    clusters_of,
    compare_methods,
    draw_weights,
    equal_mass_bins,
    equal_width_bins,
    expected_calibration_error,
    point_metrics,
    reliability_curve,
)
from llmrl.ats.selective import aurc
from llmrl.intervals import interval


def predictions(confidence, correct, window=None, nll=None):
    confidence = np.asarray(confidence, dtype=np.float64)
    window = np.arange(len(confidence)) if window is None else np.asarray(window)
    nll = -np.log(np.clip(confidence, 1e-9, 1)) if nll is None else nll
    return Predictions(confidence, np.asarray(correct, dtype=bool), nll, window)


def calibrated(rng, tokens, windows, tilt=0.0):
    confidence = rng.beta(3, 2, tokens)
    correct = rng.random(tokens) < np.clip(confidence - tilt, 0, 1)
    return predictions(confidence, correct, np.arange(tokens) * windows // tokens)


# --- point values -----------------------------------------------------------------------------------------------------


def test_expected_calibration_error_by_hand():
    # five bins of 0.2: [0.1, 0.15] has accuracy 1/2 and confidence 0.125, [0.7] 1 and 0.7, [0.85, 0.95] 1/2 and 0.9
    confidence, correct = np.array([0.1, 0.15, 0.7, 0.85, 0.95]), np.array([True, False, True, True, False])
    by_hand = 2 / 5 * abs(0.5 - 0.125) + 1 / 5 * abs(1 - 0.7) + 2 / 5 * abs(0.5 - 0.9)
    assert expected_calibration_error(confidence, correct, bins=5) == pytest.approx(by_hand, rel=1e-12)


def test_expected_calibration_error_counts_confidence_of_exactly_one():
    assert expected_calibration_error(np.ones(4), np.array([True, False, False, False])) == pytest.approx(0.75)


def test_equal_width_bins_are_closed_below_and_the_last_at_one():
    assert equal_width_bins(np.array([0.0, 0.2, 0.2 - 1e-9, 0.8, 1.0]), 5).tolist() == [0, 1, 0, 4, 4]


def test_equal_mass_bins_share_the_count():
    confidence = np.random.default_rng(0).random(1000)
    assert np.bincount(equal_mass_bins(confidence, 10)).tolist() == [100] * 10


def test_equal_mass_bins_keep_ties_together():
    confidence = np.array([0.3] * 50 + [0.5] * 30 + [0.9] * 20)
    bins = equal_mass_bins(confidence, 10)
    assert [len(set(bins[confidence == value])) for value in (0.3, 0.5, 0.9)] == [1, 1, 1]
    assert len(set(bins)) == 3
    assert equal_mass_bins(np.full(7, 0.4), 15).max() <= 1


def test_equal_mass_calibration_error_by_hand():
    confidence, correct = np.array([0.2, 0.4, 0.6, 0.8]), np.array([False, True, True, True])
    by_hand = 0.5 * abs(0.5 - 0.3) + 0.5 * abs(1.0 - 0.7)
    assert calibration_error(confidence, correct, equal_mass_bins(confidence, 2)) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("decimals", [15, 1], ids=["distinct", "ties"])
def test_auroc_is_sklearns(decimals):
    rng = np.random.default_rng(1)
    confidence = rng.random(500).round(decimals)
    correct = rng.random(500) < confidence
    assert auroc(confidence, correct) == pytest.approx(roc_auc_score(correct, confidence), rel=1e-12)


@pytest.mark.parametrize("value", [True, False])
def test_auroc_of_one_class_is_nan(value):
    assert math.isnan(auroc(np.array([0.2, 0.7]), np.array([value, value])))


def test_point_metrics_against_sklearn_and_definitions():
    rng = np.random.default_rng(2)
    p = calibrated(rng, 400, 20, tilt=0.2)
    found = point_metrics(p)
    assert set(found) == set(METRICS)
    assert found["brier"] == pytest.approx(brier_score_loss(p.correct, p.confidence), rel=1e-12)
    assert found["accuracy"] == pytest.approx(p.correct.sum() / 400)
    assert found["nll"] == pytest.approx(sum(p.nll) / 400)
    loop = 0.0
    for k in range(15):
        last = k == 14
        inside = (p.confidence >= k / 15) & ((p.confidence < (k + 1) / 15) | last)
        if inside.any():
            loop += inside.mean() * abs(p.correct[inside].mean() - p.confidence[inside].mean())
    assert found["ece"] == pytest.approx(loop, rel=1e-9)


def test_reliability_curve_by_hand():
    curve = reliability_curve(predictions([0.1, 0.3, 0.35, 1.0], [False, True, False, True]), bins=4)
    assert curve["count"] == [1, 2, 0, 1]
    np.testing.assert_allclose(curve["confidence"], [0.1, 0.325, np.nan, 1.0])
    np.testing.assert_allclose(curve["accuracy"], [0.0, 0.5, np.nan, 1.0])


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_draw_weights_resamples_all_windows_each_time():
    weights = draw_weights(np.array([3, 3, 8, 5]), draws=50, seed=0)
    assert weights.shape == (50, 3)
    assert (weights.sum(1) == 3).all()
    assert (weights == draw_weights(np.array([3, 3, 8, 5]), draws=50, seed=0)).all()


def test_bootstrap_metrics_equal_metrics_of_the_resampled_tokens():
    rng = np.random.default_rng(3)
    p = calibrated(rng, 300, 10, tilt=0.1)
    weights = draw_weights(p.window, draws=5, seed=1)
    found = bootstrap_metrics(p, weights)
    for draw in range(5):
        times = weights[draw][p.window].astype(int)
        index = np.repeat(np.arange(300), times)
        resampled = Predictions(p.confidence[index], p.correct[index], p.nll[index], p.window[index])
        expected = point_metrics(resampled)
        for metric in ("ece", "nll", "brier", "accuracy"):
            assert found[metric][draw] == pytest.approx(expected[metric], rel=1e-9), metric
        for metric in ("auroc", "aurc"):
            assert found[metric][draw] == pytest.approx(expected[metric], abs=2e-3), metric
    assert set(found) == set(METRICS)


def test_bootstrap_metrics_do_not_depend_on_the_order_of_tokens(monkeypatch):
    monkeypatch.setattr(bootstrap, "_TABLE", 64)  # a few windows at a time
    p = calibrated(np.random.default_rng(11), 600, 30, tilt=0.1)
    order = np.random.default_rng(12).permutation(600)
    mixed = Predictions(p.confidence[order], p.correct[order], p.nll[order], p.window[order])
    weights = draw_weights(p.window, draws=5, seed=0)
    found, again = bootstrap_metrics(p, weights), bootstrap_metrics(mixed, weights)
    for metric in METRICS:
        assert again[metric] == pytest.approx(found[metric], rel=1e-9), metric


@pytest.mark.parametrize("table", [1, 40, 1 << 22])
def test_sums_by_draw_in_blocks_of_windows(table, monkeypatch):
    monkeypatch.setattr(bootstrap, "_TABLE", table)
    window, cell = np.array([0, 0, 1, 3, 3, 3, 4]), np.array([2, 0, 1, 1, 1, 0, 2])
    values, weights = np.arange(1.0, 8.0), np.array([[1.0, 2.0, 0.0, 3.0, 0.0], [0.0, 0.0, 5.0, 0.0, 1.0]])
    assert bootstrap.sums_by_draw(weights, window, cell, 3).tolist() == [[1 + 3, 2 + 6, 1], [0, 0, 1]]
    assert bootstrap.sums_by_draw(weights, window, cell, 3, values).tolist() == [[2 + 18, 6 + 27, 1], [0, 0, 7]]


def test_bootstrap_auroc_is_within_1e_3_of_the_exact_one():
    p = calibrated(np.random.default_rng(4), 20_000, 40)
    once = np.ones((1, 40))
    assert bootstrap_metrics(p, once)["auroc"][0] == pytest.approx(roc_auc_score(p.correct, p.confidence), abs=1e-3)


@pytest.mark.parametrize("sharp", [1.0, 6.0], ids=["spread out", "most above .99"])
def test_bootstrap_aurc_is_within_1e_3_of_the_exact_one(sharp):
    rng = np.random.default_rng(4)
    confidence = rng.beta(3 * sharp, 2 / sharp, 20_000)
    p = predictions(confidence, rng.random(20_000) < confidence**2, np.arange(20_000) // 500)
    assert bootstrap_metrics(p, np.ones((1, 40)))["aurc"][0] == pytest.approx(aurc(confidence, p.correct), abs=1e-3)


def test_bootstrap_auroc_counts_ties_half():
    rng = np.random.default_rng(9)
    confidence = rng.random(2000).round(1)
    p = predictions(confidence, rng.random(2000) < confidence, np.arange(2000) // 50)
    found = bootstrap_metrics(p, np.ones((1, 40)))["auroc"][0]
    assert found == pytest.approx(roc_auc_score(p.correct, confidence), rel=1e-12)


def test_bootstrap_auroc_of_a_draw_with_one_class_is_nan():
    p = predictions([0.2, 0.9], [False, True])
    found = bootstrap_metrics(p, np.array([[2.0, 0.0], [1.0, 1.0]]))["auroc"]
    assert math.isnan(found[0])
    assert found[1] == 1.0


def test_compare_methods_intervals_contain_their_value_and_stay_in_range():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        p = calibrated(rng, 60, 6, tilt=-0.25)
        methods, _ = compare_methods({"a": p}, draws=200)
        for metric, score in methods["a"].items():
            assert score["low"] <= score["value"] <= score["high"], metric
            if metric != "brier_resolution":
                assert score["low"] >= 0, metric
            if metric != "nll":
                assert score["high"] <= 1, metric


def test_compare_methods_interval_covers_the_truth_on_calibrated_data():
    hits = {"accuracy": 0, "brier": 0}
    repetitions = 100
    # confidence ~ Beta(3, 2) and right with that probability: accuracy E[c] = 0.6, Brier E[c (1 - c)] = 0.6 - 0.4
    truth = {"accuracy": 0.6, "brier": 0.2}
    for repetition in range(repetitions):
        p = calibrated(np.random.default_rng(1000 + repetition), 1200, 60)
        methods, _ = compare_methods({"a": p}, draws=200, seed=repetition)
        for metric in hits:
            score = methods["a"][metric]
            hits[metric] += score["low"] <= truth[metric] <= score["high"]
    assert 86 <= hits["accuracy"] <= 100
    assert 86 <= hits["brier"] <= 100


def test_compare_methods_resamples_windows_not_tokens():
    rng = np.random.default_rng(5)
    single = calibrated(rng, 100, 100, tilt=0.2)
    # the same 100 windows with every token 25 times: nothing new was observed
    copies = Predictions(*(np.repeat(x, 25) for x in (single.confidence, single.correct, single.nll, single.window)))
    narrow, _ = compare_methods({"a": single}, draws=400)
    wide, _ = compare_methods({"a": copies}, draws=400)
    for metric in ("nll", "brier", "accuracy", "ece"):
        width = [m["a"][metric]["high"] - m["a"][metric]["low"] for m in (narrow, wide)]
        assert width[1] == pytest.approx(width[0], rel=1e-6), metric


def test_compare_methods_difference_of_identical_methods_is_exactly_zero():
    p = calibrated(np.random.default_rng(6), 500, 25)
    _, differences = compare_methods({"a": p, "b": p}, pairs=[("a", "b")])
    for metric, score in differences["a - b"].items():
        assert (score["value"], score["low"], score["high"]) == (0.0, 0.0, 0.0), metric


def test_compare_methods_difference_is_paired():
    rng = np.random.default_rng(7)
    p = calibrated(rng, 2000, 20)
    noise = rng.normal(size=20)[p.window]  # windows differ a lot, the methods by a constant
    a = Predictions(p.confidence, p.correct, 2 + noise, p.window)
    b = Predictions(p.confidence, p.correct, 2.1 + noise, p.window)
    methods, differences = compare_methods({"a": a, "b": b}, pairs=[("a", "b")])
    assert methods["a"]["nll"]["high"] > methods["b"]["nll"]["low"]
    score = differences["a - b"]["nll"]
    assert score["low"] == pytest.approx(-0.1)
    assert score["high"] == pytest.approx(-0.1)


def test_compare_methods_same_seed_same_intervals():
    p = calibrated(np.random.default_rng(8), 300, 30)
    assert compare_methods({"a": p}, seed=3) == compare_methods({"a": p}, seed=3)
    assert compare_methods({"a": p}, seed=3) != compare_methods({"a": p}, seed=4)


@pytest.mark.parametrize(("truth", "tokens"), [(0.02, 3000), (0.01, 8000)])
def test_interval_covers_the_true_ece(truth, tokens):
    """Every bin is too sure of itself by `truth`; a percentile interval centred on the value covers it 73% and 68%."""
    hits, repetitions = 0, 100
    for repetition in range(repetitions):
        rng = np.random.default_rng(repetition)
        confidence = 0.1 + 0.85 * rng.beta(3, 2, tokens)
        p = predictions(confidence, rng.random(tokens) < confidence - truth, np.arange(tokens) * 50 // tokens)
        found = interval(
            expected_calibration_error(p.confidence, p.correct),
            bootstrap_metrics(p, draw_weights(p.window, draws=200, seed=repetition))["ece"],
        )
        assert 0 <= found["low"] <= found["value"] <= found["high"]
        hits += found["low"] <= truth <= found["high"]
    assert hits >= 0.85 * repetitions


def test_compare_methods_of_an_almost_perfect_model_ends_at_one():
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 1, 600)
    p = predictions(confidence, rng.random(600) < confidence**0.02, np.arange(600) // 20)
    methods, _ = compare_methods({"a": p}, draws=200)
    assert methods["a"]["accuracy"]["value"] < methods["a"]["accuracy"]["high"] == 1.0


@pytest.mark.parametrize("windows", [1, 2, MIN_CLUSTERS - 1])
def test_compare_methods_with_few_windows_draws_blocks_of_tokens(windows):
    p = calibrated(np.random.default_rng(10), 800, windows, tilt=0.2)
    methods, differences = compare_methods({"a": p, "b": replace(p, nll=p.nll**2)}, draws=200, pairs=[("a", "b")])
    for metric, score in methods["a"].items():
        assert 0.001 < score["high"] - score["low"] < 0.5, metric
    assert differences["a - b"]["nll"]["high"] > differences["a - b"]["nll"]["low"]


def test_clusters_of_windows_or_blocks():
    enough = np.repeat(np.arange(MIN_CLUSTERS), 7)
    assert clusters_of(enough) == (pytest.approx(enough), "window")
    found, name = clusters_of(np.repeat(np.arange(MIN_CLUSTERS - 1), 50))
    assert name == "block of 23 tokens"
    assert np.bincount(found)[:-1].tolist() == [23] * 41
    assert (np.diff(found) >= 0).all()
    # hardly any tokens at all
    assert clusters_of(np.zeros(5, dtype=np.int64))[0].tolist() == [0, 1, 2, 3, 4]
