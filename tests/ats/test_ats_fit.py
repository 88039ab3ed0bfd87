import math

import numpy as np
import pytest
import torch

from llmrl.ats.evaluate import fit_and_score, pairs_of
from llmrl.ats.features import TokenFeatures, exact_lse
from llmrl.ats.fit import (
    curve_loss,
    fit_linear,
    fit_temperature,
    head_log_scales,
    scalar_head,
    shuffle_hidden,
)
from llmrl.ats.options import LINEAR, NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE
from llmrl.ats.splits import Split
from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE

DIRECTION = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])


def constant(value):
    return lambda hidden: torch.full((len(hidden),), value)


def heterogeneous(hidden):
    return hidden @ DIRECTION - 0.4


def mean_nll(world, log_scale):
    """From full logits, float64."""
    scaled = world.logits.double() * log_scale.double().exp()[:, None]
    return torch.nn.functional.cross_entropy(scaled, world.features.target).item()


def replace(features, **changed):
    return TokenFeatures(**{**vars(features), **changed})


# --- one number -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [-0.9, 0.0, 0.6])
def test_fit_temperature_nll_recovers_the_true_temperature(truth, make_world):
    world = make_world(constant(truth))
    assert fit_temperature(world.features, "nll") == pytest.approx(truth, abs=0.06)


def test_fit_temperature_nll_is_the_minimum_of_the_likelihood(make_world):
    world = make_world(constant(-0.5), tokens=2000)
    grid = np.arange(-0.8, -0.2, 0.002)
    best = min(grid, key=lambda u: mean_nll(world, torch.full((2000,), u)))
    assert fit_temperature(world.features, "nll") == pytest.approx(best, abs=0.004)


def test_fit_temperature_ece_is_near_the_brute_force_minimum(make_world):
    world = make_world(constant(-0.7))
    correct = world.features.correct.numpy()

    def ece(u):
        confidence = (world.logits.double() * math.exp(u)).softmax(-1).amax(-1).numpy()
        bins = np.minimum((confidence * 15).astype(int), 14)
        return sum(abs((correct - confidence)[bins == k].sum()) for k in range(15)) / len(correct)

    least = min(ece(u) for u in np.linspace(-1.2, -0.2, 401))
    assert ece(fit_temperature(world.features, "ece")) <= least + 1e-3
    assert ece(0.0) > least + 0.1


@pytest.mark.parametrize(("truth", "bound"), [(-6.0, MIN_LOG_SCALE), (5.0, MAX_LOG_SCALE)])
def test_fit_temperature_stays_within_the_clip(truth, bound, make_world):
    found = fit_temperature(make_world(constant(truth), tokens=1000).features, "nll")
    assert MIN_LOG_SCALE <= found <= MAX_LOG_SCALE
    assert found == pytest.approx(bound, abs=0.7)


def test_fit_temperature_without_tokens_changes_nothing(make_world):
    features = make_world(constant(0.0), tokens=64).features
    assert fit_temperature(features.select(torch.zeros(64, dtype=torch.bool)), "nll") == 0.0


# --- linear -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "tolerance"), [("nll", 0.07), ("top_label", 0.15), ("nll+top_label", 0.08)])
def test_fit_linear_recovers_a_linear_temperature(loss, tolerance, make_world):
    fit, validation = make_world(heterogeneous, seed=1), make_world(heterogeneous, tokens=2048, seed=2)
    head = fit_linear(fit.features, validation.features, loss=loss, seed=0)
    assert (head.weight[0] - DIRECTION).abs().max() < tolerance
    assert head.bias.item() == pytest.approx(-0.4, abs=tolerance)


@pytest.fixture(scope="module")
def heterogeneous_fit(make_world):
    fit, validation = make_world(heterogeneous, seed=1), make_world(heterogeneous, tokens=2048, seed=2)
    return fit, validation, make_world(heterogeneous, tokens=4096, seed=3)


def test_fit_linear_beats_the_scalar_and_the_shuffled_control_does_not(heterogeneous_fit):
    fit, validation, test = heterogeneous_fit
    scalar = mean_nll(test, torch.full((4096,), fit_temperature(fit.features, "nll")))
    linear = fit_linear(fit.features, validation.features, loss="nll", seed=0)
    assert mean_nll(test, head_log_scales(linear, test.features.hidden)) < scalar - 0.02

    control = fit_linear(shuffle_hidden(fit.features, 0), shuffle_hidden(validation.features, 1), loss="nll", seed=0)
    dealt = shuffle_hidden(test.features, 2).hidden
    assert mean_nll(test, head_log_scales(control, dealt)) == pytest.approx(scalar, abs=3e-3)
    assert head_log_scales(control, dealt).std() < 0.06


def test_fit_linear_ties_with_the_scalar_on_homogeneous_data(make_world):
    fit, validation = make_world(constant(-0.5), seed=1), make_world(constant(-0.5), tokens=2048, seed=2)
    test = make_world(constant(-0.5), tokens=4096, seed=3)
    head = fit_linear(fit.features, validation.features, loss="nll", seed=0)
    scalar = mean_nll(test, torch.full((4096,), fit_temperature(fit.features, "nll")))
    assert mean_nll(test, head_log_scales(head, test.features.hidden)) == pytest.approx(scalar, abs=3e-3)


def test_fit_linear_does_not_depend_on_the_units_of_the_features(heterogeneous_fit):
    """Standardised inside, folded into weight and bias: tau of (h * a + c) is tau of h."""
    fit, validation, test = heterogeneous_fit
    scale, shift = torch.logspace(-2, 2, 8), torch.linspace(-5, 5, 8)

    def moved(world):
        return replace(world.features, hidden=world.features.hidden * scale + shift)

    plain = fit_linear(fit.features, validation.features, loss="nll", seed=0)
    other = fit_linear(moved(fit), moved(validation), loss="nll", seed=0)
    tau = head_log_scales(plain, test.features.hidden)
    torch.testing.assert_close(head_log_scales(other, moved(test).hidden), tau, rtol=0, atol=2e-3)


def test_fit_linear_records_are_losses_of_the_returned_head(heterogeneous_fit):
    """Epoch 0 is the scalar, the least validation loss is kept, and folding leaves that loss what it was."""
    fit, validation, _ = heterogeneous_fit
    records = []
    head = fit_linear(fit.features, validation.features, loss="nll", seed=0, on_epoch=records.append)
    assert [r.epoch for r in records] == list(range(len(records)))
    assert len(records) > 10
    scalar = torch.full((2048,), fit_temperature(fit.features, "nll"))
    assert records[0].validation_loss == pytest.approx(mean_nll(validation, scalar), abs=2e-4)
    kept = mean_nll(validation, head_log_scales(head, validation.features.hidden))
    assert kept == pytest.approx(min(r.validation_loss for r in records), abs=2e-4)


def test_fit_linear_keeps_the_scalar_when_every_epoch_is_worse(make_world):
    fit = make_world(heterogeneous, tokens=2048, seed=1)
    mirrored = make_world(lambda hidden: -(hidden @ DIRECTION) - 0.4, tokens=1024, seed=2)
    records = []
    head = fit_linear(fit.features, mirrored.features, loss="nll", seed=0, on_epoch=records.append)
    assert min(records, key=lambda r: r.validation_loss).epoch == 0
    assert head.weight.eq(0).all()
    assert head.bias.item() == pytest.approx(fit_temperature(fit.features, "nll"), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_linear_gives_a_constant_feature_no_weight(dtype, make_world):
    def with_constant(world):
        return replace(
            world.features,
            hidden=torch.cat([world.features.hidden, torch.full((len(world.logits), 1), 0.1)], 1).to(dtype),
        )

    fit, validation = make_world(heterogeneous, tokens=2048, seed=1), make_world(heterogeneous, tokens=1024, seed=2)
    head = fit_linear(with_constant(fit), with_constant(validation), loss="nll", seed=0)
    assert head.weight[0, -1] == 0
    assert head.weight[0, 0] > 0.2
    assert head.weight.dtype == head.bias.dtype == torch.float32


def test_fit_linear_same_seed_same_head_and_other_seeds_differ(make_world):
    fit, validation = make_world(heterogeneous, tokens=6000, seed=1), make_world(heterogeneous, tokens=512, seed=2)
    heads = [fit_linear(fit.features, validation.features, loss="nll", seed=seed) for seed in (0, 0, 1)]
    assert heads[0].weight.equal(heads[1].weight)
    assert heads[0].bias.equal(heads[1].bias)
    assert not heads[0].weight.equal(heads[2].weight)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_curve_loss_is_the_loss_of_full_logits(heterogeneous_fit):
    _, _, test = heterogeneous_fit
    log_scale = heterogeneous(test.features.hidden).clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
    found = curve_loss("nll", test.features, log_scale).double().mean().item()
    assert found == pytest.approx(mean_nll(test, log_scale), abs=1e-4)


def test_shuffle_hidden_moves_hidden_states_only(make_world):
    features = make_world(constant(0.0), tokens=500).features
    shuffled = shuffle_hidden(features, seed=1)
    assert not shuffled.hidden.equal(features.hidden)
    assert torch.equal(shuffled.hidden.sort(0).values, features.hidden.sort(0).values)
    for name in ("gap", "correct", "target", "window", "curve", "slope"):
        assert getattr(shuffled, name) is getattr(features, name)
    assert shuffle_hidden(features, seed=1).hidden.equal(shuffled.hidden)


def test_scalar_head_reads_nothing():
    head = scalar_head(0.25, hidden_size=4)
    torch.testing.assert_close(head_log_scales(head, torch.arange(40.0).view(10, 4)), torch.full((10,), 0.25))


def test_exact_lse_is_the_definition_for_several_methods_in_one_sweep(monkeypatch, make_world):
    from llmrl.ats import features as module

    world = make_world(constant(0.0), tokens=700)
    monkeypatch.setattr(module, "CHUNK_BYTES", 24 * 4 * 64)  # chunks of 64 tokens, the last one shorter
    scales = {"a": torch.zeros(700), "b": torch.linspace(MIN_LOG_SCALE, MAX_LOG_SCALE, 700)}
    found = exact_lse(world.layer, world.features, scales)
    z = world.logits.double() - world.logits.double().amax(-1, keepdim=True)
    for name, scale in scales.items():
        direct = (z * scale.double().exp()[:, None]).logsumexp(-1)
        torch.testing.assert_close(found[name].double(), direct, rtol=1e-5, atol=1e-6)


# --- every method on one split ----------------------------------------------------------------------------------------

ALL = [NONE, TEMPERATURE, TEMPERATURE_ECE, LINEAR, SHUFFLED]


@pytest.fixture(scope="module")
def result(make_world):
    world = make_world(heterogeneous, windows=100)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    found = fit_and_score(world.features, split, world.layer, methods=ALL, loss="nll", seed=0, draws=200)
    return world, split, found


def test_fit_and_score_scores_are_those_of_full_logits_on_the_test_windows(result):
    world, split, found = result
    inside = torch.isin(world.features.window, torch.tensor(split.test))
    z, y = world.logits[inside].double(), world.features.target[inside]
    for name in (NONE, TEMPERATURE, LINEAR):
        scale = head_log_scales(found.heads[name], world.features.hidden[inside]).double()
        probabilities = (z * scale.exp()[:, None]).softmax(-1)
        confidence, guess = probabilities.max(-1)
        score = found.methods[name]
        assert score["nll"]["value"] == pytest.approx(
            -probabilities.gather(1, y[:, None]).log().mean().item(), abs=1e-5
        )
        assert score["brier"]["value"] == pytest.approx(
            ((confidence - (guess == y).double()) ** 2).mean().item(), abs=1e-5
        )
        assert score["accuracy"]["value"] == pytest.approx((guess == y).double().mean().item())


def test_fit_and_score_linear_wins_where_temperatures_differ(result):
    _, _, found = result
    assert found.best == LINEAR
    for reference in (NONE, TEMPERATURE, TEMPERATURE_ECE):
        assert found.differences[f"{LINEAR} - {reference}"]["nll"]["high"] < 0
    # the control falls back to the scalar
    control = found.differences[f"{SHUFFLED} - {TEMPERATURE}"]["nll"]
    assert control["low"] < 0.01
    assert abs(control["value"]) < 0.01


def test_fit_and_score_accuracy_is_the_same_for_every_method(result):
    _, _, found = result
    assert len({found.methods[name]["accuracy"]["value"] for name in ALL}) == 1


def test_fit_and_score_chooses_on_validation_and_never_the_control(make_world):
    """The test slice is built so that it would choose otherwise."""
    good = make_world(heterogeneous, windows=100)
    mirrored = make_world(lambda hidden: -(hidden @ DIRECTION) - 0.4, windows=100)
    late = good.features.window >= 65
    names = ("gap", "correct", "target")
    mixed = {n: torch.where(late, getattr(mirrored.features, n), getattr(good.features, n)) for n in names}
    features = replace(good.features, **mixed)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    found = fit_and_score(features, split, good.layer, methods=ALL, loss="nll", seed=0, draws=50)
    assert found.best == LINEAR
    assert found.methods[LINEAR]["brier"]["value"] > found.methods[TEMPERATURE]["brier"]["value"]
    assert found.best == min((n for n in ALL if n != SHUFFLED), key=lambda n: found.validation[n]["brier"])


def test_pairs_of_reports_each_method_against_base_and_scalars():
    assert pairs_of(ALL) == [
        (TEMPERATURE, NONE), (TEMPERATURE_ECE, NONE), (LINEAR, NONE), (SHUFFLED, NONE),
        (TEMPERATURE_ECE, TEMPERATURE), (LINEAR, TEMPERATURE), (SHUFFLED, TEMPERATURE),
        (LINEAR, TEMPERATURE_ECE), (SHUFFLED, TEMPERATURE_ECE),
    ]  # fmt: skip
