import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from llmrl.ats.selective import (
    ErrorThreshold,
    aurc,
    aurc_of,
    binomial_cdf,
    risk_at_coverage,
    risk_coverage_curve,
    threshold_for_error,
)
from llmrl.errors import DataError, UsageError

# --- risk and coverage ------------------------------------------------------------------------------------------------


def test_aurc_by_hand():
    # most confident first: right, wrong, right, wrong; risks 0, 1/2, 1/3, 1/2
    confidence, correct = np.array([0.2, 0.9, 0.7, 0.4]), np.array([False, True, False, True])
    assert aurc(confidence, correct) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)


def test_aurc_is_the_mean_over_the_orders_of_ties():
    confidence = np.array([0.9, 0.9, 0.9, 0.5, 0.5, 0.1])
    wrong = np.array([1, 0, 0, 1, 0, 1])
    areas = []
    for first in itertools.permutations([0, 1, 2]):
        for second in itertools.permutations([3, 4]):
            order = [*first, *second, 5]
            areas.append(np.mean(np.cumsum(wrong[order]) / np.arange(1, 7)))
    assert aurc(confidence, wrong == 0) == pytest.approx(np.mean(areas), rel=1e-12)


def test_aurc_of_one_confidence_is_the_error():
    assert aurc(np.full(50, 0.3), np.arange(50) % 5 > 0) == pytest.approx(0.2)


def test_aurc_of_takes_many_draws_and_empty_groups():
    count, wrong = np.array([[3.0, 2.0, 1.0], [0.0, 4.0, 0.0]]), np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    found = aurc_of(count, wrong)
    confidence = np.array([0.9] * 3 + [0.5] * 2 + [0.1])
    assert found[0] == pytest.approx(aurc(confidence, np.array([0, 1, 1, 0, 1, 0], dtype=bool)))
    assert found[1] == pytest.approx(0.25)


def test_risk_at_coverage_by_hand():
    confidence, correct = [0.9, 0.8, 0.8, 0.3], [True, False, True, False]
    assert risk_at_coverage(confidence, correct, 0.25) == 0.0
    assert risk_at_coverage(confidence, correct, 0.5) == pytest.approx(
        0.5 / 2
    )  # one of the two at .8, half of them wrong
    assert risk_at_coverage(confidence, correct, 0.75) == pytest.approx(1 / 3)
    assert risk_at_coverage(confidence, correct, 1.0) == pytest.approx(1 / 2)
    assert risk_at_coverage(confidence, correct, 0.001) == 0.0  # one answer at least
    with pytest.raises(UsageError, match="coverage above 0"):
        risk_at_coverage(confidence, correct, 0.0)


def test_risk_coverage_curve_by_hand():
    curve = risk_coverage_curve([0.3, 0.8, 0.9, 0.8], [False, False, True, True])
    assert curve == {
        "threshold": [0.9, 0.8, 0.3],
        "coverage": [0.25, 0.75, 1.0],
        "risk": [0.0, pytest.approx(1 / 3), 0.5],
    }


def test_risk_coverage_curve_of_many_answers_is_thinned_evenly():
    rng = np.random.default_rng(0)
    confidence = rng.random(5000)
    correct = rng.random(5000) < confidence
    curve = risk_coverage_curve(confidence, correct, points=50)
    assert np.allclose(curve["coverage"], np.arange(1, 51) / 50)
    for threshold, risk in zip(curve["threshold"], curve["risk"], strict=True):
        assert risk == pytest.approx(1 - correct[confidence >= threshold].mean())


# --- binomial test ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "p"),
    [(0, 1, 0.5), (3, 3, 0.2), (0, 299, 0.01), (7, 200, 0.05), (9000, 200_000, 0.0455), (150, 151, 0.9)],
)
def test_binomial_cdf_is_scipys(k, n, p):
    assert binomial_cdf(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-6)


def test_binomial_cdf_at_most_delta_is_a_clopper_pearson_bound_below_the_target():
    for k, n, target in itertools.product((0, 2, 9), (30, 100, 400), (0.02, 0.05, 0.1)):
        upper = beta.ppf(0.95, k + 1, n - k)  # one-sided 95% bound on the error rate
        assert (binomial_cdf(k, n, target) <= 0.05) == (upper <= target)


# --- threshold with a guarantee ---------------------------------------------------------------------------------------


def rising_error(rng, answers):
    # error rate .3 (1 - confidence), confidence uniform: the part above t errs .15 (1 - t)
    confidence = rng.random(answers)
    return confidence, rng.random(answers) >= 0.3 * (1 - confidence)


def true_error(threshold):
    return 0.15 * (1 - threshold)


def observed_threshold(confidence, correct, target):
    """The lowest of all confidences at which the observed error is at most the target."""
    order = np.argsort(-confidence)
    passed = np.flatnonzero(np.cumsum(~correct[order]) <= target * np.arange(1, len(order) + 1))
    return confidence[order][passed[-1]] if len(passed) else None


def naive_threshold(confidence, correct, target, delta):
    """The lowest of all confidences at which the Clopper-Pearson bound is below the target."""
    order = np.argsort(-confidence)
    wrong = np.cumsum(~correct[order])
    n = np.arange(1, len(order) + 1)
    passed = np.flatnonzero(binom.cdf(wrong, n, target) <= delta)
    return confidence[order][passed[-1]] if len(passed) else None


def test_threshold_for_error_holds_its_target_and_the_observed_error_does_not():
    target, delta, draws = 0.1, 0.1, 600
    broken, observed, found = 0, 0, 0
    for seed in range(draws):
        confidence, correct = rising_error(np.random.default_rng(seed), 500)
        result = threshold_for_error(confidence, correct, target, delta)
        if result.threshold is not None:
            found += 1
            broken += true_error(result.threshold) > target
        threshold = observed_threshold(confidence, correct, target)
        observed += threshold is not None and true_error(threshold) > target
    noise = 3 * math.sqrt(delta * (1 - delta) / draws)
    assert broken <= (delta + noise) * draws
    assert observed > 0.4 * draws
    assert found > 0.8 * draws  # not by never answering


def test_threshold_for_error_rarely_passes_above_the_target_where_the_best_of_many_tests_often_does():
    target, delta, draws = 0.1, 0.1, 600
    broken = naive = 0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        confidence, correct = rng.random(400), rng.random(400) > target * 1.0001
        broken += threshold_for_error(confidence, correct, target, delta).threshold is not None
        naive += naive_threshold(confidence, correct, target, delta) is not None
    noise = 3 * math.sqrt(delta * (1 - delta) / draws)
    assert broken <= (delta + noise) * draws
    assert naive > 2 * delta * draws


def test_threshold_for_error_with_ties_and_fixed_thresholds_holds_its_target():
    # three confidences with error .02, .05, .3: above .7 the error is .035, above .2 it is .15
    target, delta, draws = 0.06, 0.1, 400
    chosen = {"own": [], "fixed": []}
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        confidence = rng.choice([0.9, 0.7, 0.2], p=[0.3, 0.3, 0.4], size=600)
        correct = rng.random(600) >= np.select([confidence == 0.9, confidence == 0.7], [0.02, 0.05], 0.3)
        for name, thresholds in (("own", None), ("fixed", [0.1, 0.8, 0.6])):
            chosen[name].append(
                threshold_for_error(confidence, correct, target, delta, thresholds=thresholds).threshold
            )
    assert set(chosen["own"]) <= {0.9, 0.7, None}
    assert set(chosen["fixed"]) <= {0.8, 0.6, None}
    assert chosen["own"].count(0.7) > 0.7 * draws
    assert [t == 0.6 for t in chosen["fixed"]] == [t == 0.7 for t in chosen["own"]]


def test_threshold_for_error_stops_at_the_first_failure():
    # 100 right; 60 all wrong; 2,000 right, which would bring the error of all below the target again
    confidence = np.concatenate([np.full(100, 0.9), np.full(60, 0.8), np.full(2000, 0.7)])
    correct = np.concatenate([np.full(100, True), np.full(60, False), np.full(2000, True)])
    found = threshold_for_error(confidence, correct, 0.05, thresholds=[0.9, 0.8, 0.7])
    assert (found.threshold, found.error) == (0.9, 0.0)
    assert found.coverage == pytest.approx(100 / 2160)
    assert binomial_cdf(60, 2160, 0.05) < 0.05


def test_threshold_for_error_answers_everything_when_all_is_right():
    found = threshold_for_error(np.linspace(0.2, 0.9, 300), np.ones(300), 0.05)
    assert (found.threshold, found.coverage, found.error) == (0.2, 1.0, 0.0)
    assert found.answers == 300


@pytest.mark.parametrize(("answers", "passes"), [(58, False), (59, True)])
def test_threshold_for_error_needs_enough_answers(answers, passes):
    # without an error, .95^n <= .05 from n = 59
    found = threshold_for_error(np.linspace(0.2, 0.9, answers), np.ones(answers), 0.05)
    assert (found.threshold is not None) == passes


def test_threshold_for_error_without_a_threshold_is_a_plain_record():
    found = threshold_for_error(np.linspace(0, 1, 200), np.arange(200) % 2, 0.1)
    assert found == ErrorThreshold(None, 0.0, None, 0.1, 0.05, 200)
    assert json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False)) == {
        "threshold": None,
        "coverage": 0.0,
        "error": None,
        "target_error": 0.1,
        "delta": 0.05,
        "answers": 200,
    }


def test_threshold_for_error_does_not_depend_on_the_order_of_answers():
    confidence, correct = rising_error(np.random.default_rng(1), 400)
    confidence = confidence.round(1)
    order = np.random.default_rng(2).permutation(400)
    assert threshold_for_error(confidence, correct, 0.1) == threshold_for_error(confidence[order], correct[order], 0.1)


@pytest.mark.parametrize(
    ("arguments", "name"), [((0.0,), "target_error"), ((1.0,), "target_error"), ((0.1, 0), "delta")]
)
def test_threshold_for_error_refuses(arguments, name):
    with pytest.raises(UsageError, match=f"expected {name} between 0 and 1"):
        threshold_for_error([0.5], [True], *arguments)


def test_threshold_for_error_refuses_no_answers():
    with pytest.raises(DataError, match="one confidence"):
        threshold_for_error([], [], 0.1)
