import numpy as np
import pytest
from answer_worlds import answers

from llmrl.ats.bootstrap import draw_weights
from llmrl.ats.metrics import Predictions, _bootstrap_smooth_ece, bootstrap_metrics, reliability_by_kernel
from llmrl.ats.smooth_ece import GRID, residuals_on_grid, smooth_ece, smooth_ece_at, smooth_on_grid
from llmrl.intervals import interval


def predictions(confidence, correct, windows=40):
    tokens = len(confidence)
    return Predictions(confidence, correct, np.zeros(tokens), np.arange(tokens) * windows // tokens)


def direct_smooth_ece(confidence, correct, bandwidth, points=4000):
    """The definition, token by token: a Gaussian and its mirror images, integrated by the midpoint rule."""
    t = (np.arange(points) + 0.5) / points
    total = np.zeros(points)
    for c, residual in zip(confidence, correct - confidence, strict=True):
        for image in range(-6, 7, 2):
            for centre in (image + c, image - c):
                total += residual * np.exp(-0.5 * ((t - centre) / bandwidth) ** 2)
    total /= bandwidth * np.sqrt(2 * np.pi) * len(confidence)
    return np.abs(total).mean()


# --- against others ---------------------------------------------------------------------------------------------------

# smECE and smECE_sigma(.05) of relplot 1.0.3 (its authors' package). It halves its way to the width in ten steps, so ends
# within 1/1024 of the solution, and cuts its kernel off at a distance of .5.
RELPLOT = [
    (600, 0.0, 0.03752062597366438, 0.033382958588676924),
    (600, 0.15, 0.13251786363919082, 0.1324531627921679),
    (3000, 0.05, 0.059385562585302434, 0.059374436818677594),
    (3000, 0.3, 0.27406683158192485, 0.2740261150601673),
    (30000, 0.0, 0.009993872328024924, 0.00645834086238621),
]


@pytest.mark.parametrize(("count", "tilt", "free", "at_width"), RELPLOT)
def test_smooth_ece_is_relplots(count, tilt, free, at_width):
    confidence, correct = answers(count, tilt)
    assert smooth_ece(confidence, correct) == pytest.approx(free, abs=1 / 1024)
    assert smooth_ece_at(residuals_on_grid(confidence, correct), 0.05) == pytest.approx(at_width, rel=2e-3)


@pytest.mark.parametrize("bandwidth", [0.01, 0.07, 0.6])
def test_smooth_ece_at_is_the_definition(bandwidth):
    confidence, correct = answers(150, 0.2)
    confidence[:3] = 0.0, 1.0, 0.999  # reflection matters most at the ends
    found = smooth_ece_at(residuals_on_grid(confidence, correct), bandwidth)
    assert found == pytest.approx(direct_smooth_ece(confidence, correct, bandwidth), rel=2e-3)


def test_smooth_on_grid_keeps_the_sum_and_mirrors_at_the_ends():
    values = np.zeros(GRID)
    values[0] = 1.0
    smoothed = smooth_on_grid(values, 0.05)
    assert smoothed.sum() == pytest.approx(1.0)
    # a point at 0 and its mirror image: half a Gaussian, twice as high
    assert smoothed[0] * GRID == pytest.approx(2 / (0.05 * np.sqrt(2 * np.pi)), rel=1e-3)
    assert smoothed[GRID // 10] / smoothed[0] == pytest.approx(np.exp(-0.5 * (0.1 / 0.05) ** 2), rel=2e-2)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "tilt"), [(50, 0.0), (600, 0.1), (30000, 0.0), (3000, 0.5)])
def test_smooth_ece_is_the_width_it_is_measured_with(count, tilt):
    confidence, correct = answers(count, tilt)
    value = smooth_ece(confidence, correct)
    assert smooth_ece_at(residuals_on_grid(confidence, correct), value) == pytest.approx(value, abs=1e-6)


def test_smooth_ece_of_expected_answers():
    # expected instead of drawn answers: calibration and a shift are known without noise
    confidence = np.linspace(0.1, 0.9, 5000)
    assert smooth_ece(confidence, confidence) < 1e-6
    for shift in (0.003, 0.02, 0.3):
        assert smooth_ece(confidence, confidence + shift) == pytest.approx(shift, rel=1e-3)
        assert smooth_ece(confidence, confidence - shift) == pytest.approx(shift, rel=1e-3)


def test_smooth_ece_of_calibrated_answers_falls_with_their_number():
    values = [smooth_ece(*answers(count, 0.0)) for count in (1000, 10_000, 100_000)]
    assert values[0] > values[1] > values[2]
    assert values[2] < 0.008


def test_smooth_ece_does_not_jump_where_ece_does():
    # answers at .5 - e and .5 + e, wrong and right: bins at .5 tell them apart or not, the smooth error sees one group
    correct = np.tile([False, True], 500)
    near = [smooth_ece(0.5 + e * np.tile([-1.0, 1.0], 500), correct) for e in (-1e-3, 1e-3)]
    assert near[0] == pytest.approx(near[1], abs=2e-3)


@pytest.mark.parametrize(("confidence", "correct", "value"), [(1.0, True, 0.0), (1.0, False, 1.0), (0.0, False, 0.0)])
def test_smooth_ece_of_certain_answers(confidence, correct, value):
    assert smooth_ece(np.full(20, confidence), np.full(20, correct)) == pytest.approx(value, abs=1e-9)


def test_smooth_ece_cannot_be_hidden_in_the_top_bin():
    # .99 said, .90 right: one bin, one error
    correct = np.arange(1000) % 10 > 0
    assert smooth_ece(np.full(1000, 0.99), correct) == pytest.approx(0.09, rel=1e-3)


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_bootstrap_smooth_ece_is_the_error_of_the_resampled_tokens_at_one_width():
    confidence, correct = answers(2000, 0.1)
    p = predictions(confidence, correct)
    weights = draw_weights(p.window, draws=4, seed=0)
    found = bootstrap_metrics(p, weights)["smooth_ece"]
    width = smooth_ece(confidence, correct)
    for draw in range(4):
        index = np.repeat(np.arange(2000), weights[draw][p.window].astype(int))
        expected = smooth_ece_at(residuals_on_grid(confidence[index], correct[index]), width)
        assert found[draw] == pytest.approx(expected, rel=1e-9)


def test_bootstrap_smooth_ece_of_every_window_once_is_the_smooth_ece():
    confidence, correct = answers(3000, 0.05)
    found = bootstrap_metrics(predictions(confidence, correct), np.ones((1, 40)))["smooth_ece"][0]
    assert found == pytest.approx(smooth_ece(confidence, correct), abs=1e-6)


def drawn(count, tilt, seed=0):
    rng = np.random.default_rng(seed)
    confidence = 0.05 + 0.9 * np.sqrt(rng.random(count))
    return confidence, rng.random(count) < confidence - tilt * np.sin(2 * confidence)


# --- curve ------------------------------------------------------------------------------------------------------------


def test_reliability_by_kernel_follows_the_true_accuracy():
    confidence, correct = drawn(100_000, 0.05)
    curve = reliability_by_kernel(predictions(confidence, correct), points=51)
    x, y = np.array(curve["confidence"]), np.array(curve["accuracy"])
    inside = (x > 0.2) & (x < 0.9)
    truth = x - 0.05 * np.sin(2 * x)
    assert np.abs(y - truth)[inside].max() < 0.01
    assert np.abs(x - truth)[inside].max() > 0.045
    assert len(x) == 51


def test_reliability_by_kernel_gap_to_the_diagonal_is_the_smooth_ece():
    confidence, correct = answers(5000, 0.1)
    curve = reliability_by_kernel(predictions(confidence, correct), points=GRID)
    gap = np.nan_to_num(np.abs(np.array(curve["accuracy"]) - curve["confidence"]))
    assert (gap * curve["density"]).mean() == pytest.approx(smooth_ece(confidence, correct), rel=2e-3)
    assert np.mean(curve["density"]) == pytest.approx(1.0)
    assert curve["bandwidth"] == [pytest.approx(smooth_ece(confidence, correct))]


def test_reliability_by_kernel_is_nan_where_no_token_is():
    confidence = 0.8 + 0.2 * np.arange(2000) / 2000
    correct = np.arange(2000) * 0.6180339887498949 % 1 < confidence
    empty = np.isnan(reliability_by_kernel(predictions(confidence, correct), points=101)["accuracy"])
    assert empty[:70].all()
    assert not empty[80:].any()


def test_reliability_by_kernel_band_holds_the_curve_and_the_truth():
    confidence, correct = drawn(20_000, 0.05)
    p = predictions(confidence, correct)
    curve = reliability_by_kernel(p, points=51, weights=draw_weights(p.window, 200, seed=0))
    x, y, low, high = (np.array(curve[k]) for k in ("confidence", "accuracy", "low", "high"))
    inside = (x > 0.25) & (x < 0.9)
    assert (low <= y)[inside].all()
    assert (y <= high)[inside].all()
    truth = x - 0.05 * np.sin(2 * x)
    assert ((low <= truth) & (truth <= high))[inside].mean() > 0.9
    assert (high - low)[inside].max() < 0.06


@pytest.mark.parametrize(("shift", "tokens"), [(0.01, 8000), (0.02, 3000)])
def test_interval_covers_the_true_smooth_ece(shift, tokens):
    """Every confidence is too high by `shift`, so that is the error. With a new width in each draw, four in five cover it."""
    hits, repetitions = 0, 150
    for repetition in range(repetitions):
        rng = np.random.default_rng(repetition)
        confidence = 0.1 + 0.85 * rng.beta(3, 2, tokens)
        p = predictions(confidence, rng.random(tokens) < confidence - shift, windows=50)
        weights = draw_weights(p.window, draws=200, seed=repetition)
        draws = _bootstrap_smooth_ece(p, p.window, weights, weights @ np.bincount(p.window))
        found = interval(smooth_ece(p.confidence, p.correct), draws)
        hits += found["low"] <= shift <= found["high"]
    assert hits >= 0.85 * repetitions
