import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmrl.ats.features import exact_lse
from llmrl.ats.fit import (
    confidence,
    curve_loss,
    fit_temperature,
    line_search,
    scalar_head,
    shuffle_hidden,
    tokens_of_loss,
)
from llmrl.ats.losses import Loss, answer_log_loss
from llmrl.ats.run_heads import head_log_scales
from llmrl.errors import DataError
from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE
from llmrl_kernels import curve_knots, lse_curve

NLL = Loss("nll")

DIRECTION = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])


def constant(value):
    return lambda hidden: torch.full((len(hidden),), value)


def heterogeneous(hidden):
    return hidden @ DIRECTION - 0.4


def mean_nll(world, log_scale):
    """From full logits, float64."""
    scaled = world.logits.double() * log_scale.double().exp()[:, None]
    return torch.nn.functional.cross_entropy(scaled, world.features.target).item()


# --- one number -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [-0.9, 0.0, 0.6])
def test_fit_temperature_nll_recovers_the_true_temperature(truth, make_world):
    world = make_world(constant(truth))
    assert fit_temperature(world.features, NLL) == pytest.approx(truth, abs=0.06)


def test_fit_temperature_nll_is_the_minimum_of_the_likelihood(make_world):
    world = make_world(constant(-0.5), tokens=2000)
    grid = np.arange(-0.8, -0.2, 0.002)
    best = min(grid, key=lambda u: mean_nll(world, torch.full((2000,), u)))
    assert fit_temperature(world.features, NLL) == pytest.approx(best, abs=0.004)


def test_fit_temperature_ece_is_near_the_brute_force_minimum(make_world):
    world = make_world(constant(-0.7))
    correct = world.features.correct.numpy()

    def ece(u):
        confidence = (world.logits.double() * math.exp(u)).softmax(-1).amax(-1).numpy()
        bins = np.minimum((confidence * 15).astype(int), 14)
        return sum(abs((correct - confidence)[bins == k].sum()) for k in range(15)) / len(correct)

    least = min(ece(u) for u in np.linspace(-1.2, -0.2, 401))
    assert ece(fit_temperature(world.features, None)) <= least + 1e-3
    assert ece(0.0) > least + 0.1


def test_curve_loss_reference_weighs_each_window_by_its_own_prompt(make_world):
    """Windows in any batch, of a selection too, are what each is alone; a longer prompt weighs the right tokens up."""
    features = make_world(constant(0.0), tokens=640, windows=10).features
    features = replace(features, unscored=torch.arange(10) * 20)
    loss, tau = Loss("smoothing-reference", alpha=0.3), torch.full((640,), -0.2)
    alone = [curve_loss(loss, features, tau[:64], (features.window == w).nonzero()[:, 0]).item() for w in range(10)]
    assert curve_loss(loss, features, tau).tolist() == pytest.approx(alone, rel=1e-5)
    part = features.of_windows([2, 7, 9])
    assert curve_loss(loss, part, tau[:192]).tolist() == pytest.approx([alone[w] for w in (2, 7, 9)], rel=1e-5)
    plain = curve_loss(loss, replace(features, unscored=torch.zeros(10, dtype=torch.long)), tau)
    assert plain[0].item() == pytest.approx(alone[0], rel=1e-5)
    assert plain[9].item() != pytest.approx(alone[9], rel=1e-2)


@pytest.mark.parametrize(("truth", "bound"), [(-6.0, MIN_LOG_SCALE), (5.0, MAX_LOG_SCALE)])
def test_fit_temperature_stays_within_the_clip(truth, bound, make_world):
    found = fit_temperature(make_world(constant(truth), tokens=1000).features, NLL)
    assert MIN_LOG_SCALE <= found <= MAX_LOG_SCALE
    assert found == pytest.approx(bound, abs=0.7)


def test_fit_temperature_without_tokens_changes_nothing(make_world):
    features = make_world(constant(0.0), tokens=64).features
    assert fit_temperature(features.select(torch.zeros(64, dtype=torch.bool)), NLL) == 0.0


@pytest.mark.parametrize("name", ["top_label", "nll+top_label", "top_label_brier"])
def test_fit_temperature_by_a_proper_loss_recovers_the_true_temperature(name, make_world):
    world = make_world(constant(-0.6), tokens=20000)
    assert fit_temperature(world.features, Loss(name)) == pytest.approx(-0.6, abs=0.08)


@pytest.mark.parametrize(
    ("alpha", "accuracy", "confidence"),
    # known fixed points of the smoothing loss with one high logit and a flat rest: the accuracy itself at alpha 0.5
    [
        (0.5, 0.2, 0.199),
        (0.5, 0.8, 0.800),
        (0.5, 0.95, 0.950),
        (0.6, 0.2, 0.143),
        (0.6, 0.8, 0.728),
        (0.6, 0.95, 0.926),
    ],
)
def test_fit_temperature_smoothing_converges_to_its_fixed_point(alpha, accuracy, confidence, make_world):
    vocabulary = 8000
    row = torch.zeros(1, vocabulary)
    row[0, 3] = 9.0
    curve, slope = lse_curve(row, curve_knots())
    correct = torch.arange(100) < 100 * accuracy
    template = make_world(constant(0.0), tokens=100).features
    features = replace(
        template,
        gap=torch.where(correct, 0.0, 9.0),
        mean_gap=torch.full((100,), 9.0 - 9.0 / vocabulary),
        correct=correct,
        curve=curve.expand(100, -1).contiguous(),
        slope=slope.expand(100, -1).contiguous(),
    )
    scale = math.exp(fit_temperature(features, Loss("smoothing", alpha=alpha)))
    assert (row[0] * scale).softmax(-1).max().item() == pytest.approx(confidence, abs=3e-3)


def test_line_search_finds_the_minimum_within_the_bounds():
    assert line_search(lambda x: (x - 0.377) ** 2, 0.0, 1.0, 11) == pytest.approx(0.377, abs=2e-4)
    assert line_search(lambda x: x, 0.25, 1.0, 11) == 0.25
    assert line_search(lambda x: -x, 0.25, 1.0, 11) == 1.0


# --- answers ----------------------------------------------------------------------------------------------------------


def graded_world(make_world, answer=4):
    """Answers of `answer` tokens, one a window, all graded but the last ten; windows 0, 2, 4, ... are right."""
    features = make_world(constant(0.0), tokens=400, windows=400 // answer).features
    return replace(features, graded=features.window < 90, correct=features.window % 2 == 0)


def test_curve_loss_answer_is_the_log_loss_of_whole_answers(make_world):
    features = tokens_of_loss(Loss("answer"), graded_world(make_world))
    assert len(features) == 360
    log_scale = torch.linspace(-1.0, 1.0, 360)
    found = curve_loss(Loss("answer", aggregate="product"), features, log_scale)
    assert found.shape == (90,)
    log_p = -curve_loss(NLL, features, log_scale)
    expected = answer_log_loss(log_p, features.window, features.correct, "product")
    torch.testing.assert_close(found, expected)
    some = torch.arange(8, 16)  # the third and fourth answer
    torch.testing.assert_close(
        curve_loss(Loss("answer", aggregate="product"), features, log_scale[some], some), expected[2:4]
    )


def test_tokens_of_loss_refuses_answers_without_a_grade(make_world):
    features = make_world(constant(0.0), tokens=64).features
    assert tokens_of_loss(Loss("top_label"), features) is features
    with pytest.raises(DataError, match="the loss 'answer' needs graded answers"):
        tokens_of_loss(Loss("answer"), features)


def test_fit_temperature_answer_is_the_minimum_of_the_answers_log_loss(make_world):
    features = graded_world(make_world)
    loss = Loss("answer", aggregate="geometric_mean")
    found = fit_temperature(features, loss)
    graded = tokens_of_loss(loss, features)

    def mean(u):
        return curve_loss(loss, graded, torch.full((len(graded),), float(u))).mean().item()

    assert mean(found) <= min(mean(u) for u in np.linspace(MIN_LOG_SCALE, MAX_LOG_SCALE, 400)) + 1e-5


def test_confidence_of_a_graded_token_is_its_own_probability(make_world):
    world = make_world(constant(0.0), tokens=400, windows=100)
    features = replace(world.features, graded=world.features.window < 50)
    log_scale = torch.full((400,), -0.3)
    p = (world.logits.double() * math.exp(-0.3)).softmax(-1)
    said = p.gather(1, features.target[:, None])[:, 0]
    expected = torch.where(features.graded, said, p.amax(-1))
    torch.testing.assert_close(confidence(features, log_scale), expected, rtol=1e-3, atol=1e-4)
    brier = (expected - features.correct.double()).square()
    found = curve_loss(Loss("top_label_brier"), features, log_scale)
    torch.testing.assert_close(found.double(), brier, rtol=2e-3, atol=2e-4)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_curve_loss_is_the_loss_of_full_logits(make_world):
    test = make_world(heterogeneous, tokens=4096, seed=3)
    log_scale = heterogeneous(test.features.hidden).clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
    found = curve_loss(NLL, test.features, log_scale).double().mean().item()
    assert found == pytest.approx(mean_nll(test, log_scale), abs=1e-4)


def test_shuffle_hidden_moves_hidden_states_only(make_world):
    features = make_world(constant(0.0), tokens=500).features
    shuffled = shuffle_hidden(features, seed=1)
    assert not shuffled.hidden.equal(features.hidden)
    assert torch.equal(shuffled.hidden.sort(0).values, features.hidden.sort(0).values)
    assert shuffled.states is features.states
    assert not shuffled.has_sequences  # there is no order left to read
    for name in ("gap", "correct", "target", "window", "curve", "slope"):
        assert getattr(shuffled, name) is getattr(features, name)
    assert shuffle_hidden(features, seed=1).hidden.equal(shuffled.hidden)


def test_scalar_head_reads_nothing(make_world):
    head = scalar_head(0.25, hidden_size=8)
    found = head_log_scales(head, make_world(constant(0.0), tokens=64).features)
    torch.testing.assert_close(found, torch.full((64,), 0.25))


def test_exact_lse_is_the_definition_for_several_methods_in_one_sweep(monkeypatch, make_world):
    from llmrl.ats import output_layer as module

    world = make_world(constant(0.0), tokens=700)
    monkeypatch.setattr(module, "CHUNK_BYTES", 24 * 4 * 64)  # chunks of 64 tokens, the last one shorter
    scales = {"a": torch.zeros(700), "b": torch.linspace(MIN_LOG_SCALE, MAX_LOG_SCALE, 700)}
    found = exact_lse(world.layer, world.features, scales)
    z = world.logits.double() - world.logits.double().amax(-1, keepdim=True)
    for name, scale in scales.items():
        direct = (z * scale.double().exp()[:, None]).logsumexp(-1)
        torch.testing.assert_close(found[name].double(), direct, rtol=1e-5, atol=1e-6)
