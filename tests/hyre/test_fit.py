"""Heads trained on features: against scikit-learn, and folded against unfolded."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from llmrl.errors import DataError, UsageError
from llmrl.hyre.diversity import HeadPlan, plan_heads
from llmrl.hyre.fit import FitSettings, HeadShape, Labelled, Pairs, TrainedHeads, feature_scale, fit_heads, row_losses
from llmrl.hyre.posterior import HyrePosterior

DRAW = torch.Generator().manual_seed(0)
CHOSEN, REJECTED = torch.randn(80, 6, generator=DRAW) + 0.4, torch.randn(80, 6, generator=DRAW)
PAIRS = Pairs(CHOSEN, REJECTED)


def everything(heads=1, rows=80):
    return plan_heads("none", heads, rows)


def test_a_linear_head_is_logistic_regression_of_the_differences():
    """Its objective is the mean loss and l2/2 |w|^2 in scaled features: scikit-learn's C is 1 / (N l2)."""
    head = fit_heads(PAIRS, everything(), settings=FitSettings(l2=0.01))
    scale = float(feature_scale(PAIRS)[1][0])
    x = (CHOSEN - REJECTED).numpy() * scale
    turned = np.where(np.arange(80) % 2, 1.0, -1.0)[:, None]
    other = LogisticRegression(C=1 / (80 * 0.01), fit_intercept=False, tol=1e-9, max_iter=10_000)
    other.fit(x * turned, turned[:, 0] > 0)
    assert head.weight[0].numpy() == pytest.approx(other.coef_[0] * scale, abs=1e-3)


def test_a_head_sees_its_rows_alone():
    rows = np.zeros((2, 80), np.float32)
    rows[0, :40], rows[1, 40:] = 1 / 40, 1 / 40
    both = fit_heads(PAIRS, HeadPlan(rows, np.ones(2, np.float32), ("a", "b")))
    changed = Pairs(torch.cat([CHOSEN[:40], CHOSEN[40:].flip(0)]), torch.cat([REJECTED[:40], REJECTED[40:].flip(0)]))
    same = fit_heads(changed, HeadPlan(rows, np.ones(2, np.float32), ("a", "b")))
    assert torch.allclose(both.weight, same.weight, atol=1e-3)  # of the second head the rows changed places only
    alone = fit_heads(Pairs(CHOSEN[:40], REJECTED[:40]), everything(rows=40))
    direction = torch.nn.functional.cosine_similarity(both.weight[0], alone.weight[0], 0)
    assert direction > 0.999


def test_a_turned_head_prefers_the_other_side():
    plan = HeadPlan(np.full((2, 80), 1 / 80, np.float32), np.array([1, -1], np.float32), ("+", "-"))
    head = fit_heads(PAIRS, plan)
    assert torch.allclose(head.weight[0], -head.weight[1], atol=1e-3)


def test_the_objective_is_a_sum_over_heads():
    """A head is what it is alone: more heads do not make each of them learn less."""
    one, many = fit_heads(PAIRS, everything()), fit_heads(PAIRS, everything(30))
    assert torch.allclose(one.weight[0], many.weight[17], atol=1e-3)


def test_a_margin_asks_for_more():
    wide = fit_heads(Pairs(CHOSEN, REJECTED, torch.full((80,), 2.0)), everything())
    plain = fit_heads(PAIRS, everything())
    assert wide.weight.norm() > 1.2 * plain.weight.norm()


def test_row_losses_by_hand():
    first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 3.0]])
    found = row_losses(Pairs(first, second, torch.tensor([0.5])), first, second, torch.tensor([1.0, -1.0]), slice(None))
    assert found[0].tolist() == pytest.approx([np.log1p(np.exp(-0.5)), np.log1p(np.exp(-2.5))], abs=1e-6)


def test_centering_moves_the_mean_score_to_zero():
    shifted = Pairs(CHOSEN + 5, REJECTED + 5)
    head = fit_heads(shifted, everything(), settings=FitSettings(center=0.1))
    assert abs(float((head(CHOSEN + 5) + head(REJECTED + 5)).mean())) < 0.05


def test_a_regressor_is_ridge_regression():
    y = CHOSEN @ torch.arange(6.0) + 3
    head = fit_heads(Labelled(CHOSEN, y), everything(), settings=FitSettings(l2=0.05))
    scale = float(feature_scale(Labelled(CHOSEN, y))[1][0])
    other = Ridge(alpha=80 * 0.05).fit(CHOSEN.numpy() * scale, y.numpy())
    assert head(CHOSEN)[:, 0].numpy() == pytest.approx(other.predict(CHOSEN.numpy() * scale), abs=1e-3)


def test_a_classifier_is_logistic_regression_with_a_bias():
    y = (CHOSEN[:, 0] + 0.3 * REJECTED[:, 0] > 0.5).float()
    head = fit_heads(Labelled(CHOSEN, y, classes=2), everything(), settings=FitSettings(l2=0.02, steps=500))
    scale = float(feature_scale(Labelled(CHOSEN, y))[1][0])
    other = LogisticRegression(C=1 / (80 * 0.02), tol=1e-10, max_iter=10_000).fit(CHOSEN.numpy() * scale, y.numpy())
    assert head(CHOSEN)[:, 0].numpy() == pytest.approx(other.decision_function(CHOSEN.numpy() * scale), abs=2e-2)


def test_a_classifier_of_one_class_is_refused():
    with pytest.raises(DataError, match="one class"):
        fit_heads(Labelled(CHOSEN, torch.ones(80), classes=2), everything())


CLASSES = torch.stack([CHOSEN[:, 0], REJECTED[:, 0], CHOSEN[:, 1] * 0.5], 1).argmax(1).float()


def test_heads_of_three_classes_are_multinomial_logistic_regression():
    """Two heads, each on a half of the rows: scores [N, 2 * 3], those of a head side by side."""
    halves = np.repeat(np.eye(2, dtype=np.float32), 40, 1) / 40
    plan = HeadPlan(halves, np.ones(2, np.float32), ("a", "b"))
    examples = Labelled(CHOSEN, CLASSES, classes=3)
    head = fit_heads(examples, plan, settings=FitSettings(l2=0.02, steps=500))
    scores = head(CHOSEN).unflatten(-1, (2, 3)).softmax(-1).numpy()
    scale = float(feature_scale(examples)[1][0])
    for k, rows in enumerate((slice(0, 40), slice(40, 80))):
        x, y = CHOSEN[rows].numpy() * scale, CLASSES[rows].numpy()
        other = LogisticRegression(C=1 / (40 * 0.02), tol=1e-10, max_iter=10_000).fit(x, y)
        assert scores[:, k] == pytest.approx(other.predict_proba(CHOSEN.numpy() * scale), abs=5e-3)


def test_heads_of_classes_are_weighed_by_the_posterior():
    """Labels of the first half's rows favour the head that was trained on them."""
    halves = np.repeat(np.eye(2, dtype=np.float32), 40, 1) / 40
    swapped = torch.cat([CLASSES[:40], (CLASSES[40:] + 1) % 3])
    head = fit_heads(Labelled(CHOSEN, swapped, classes=3), HeadPlan(halves, np.ones(2, np.float32), ("a", "b")))
    outputs = head(CHOSEN[:40]).unflatten(-1, (2, 3)).double().numpy()
    posterior = HyrePosterior(2)
    posterior.update(outputs[:5], CLASSES[:5].numpy())
    assert posterior.weights[0] > 0.9


def test_classes_that_cannot_be_trained_on_are_refused():
    turned = HeadPlan(np.full((1, 80), 1 / 80, np.float32), -np.ones(1, np.float32), ("-",))
    for examples, plan, words in (
        (Labelled(CHOSEN, CLASSES + 1, classes=3), everything(), "classes from 0 to 2"),
        (Labelled(CHOSEN, CLASSES, classes=3), turned, "no other side"),
    ):
        with pytest.raises(DataError, match=words):
            fit_heads(examples, plan)
    with pytest.raises(UsageError, match="epinet heads have one score"):
        fit_heads(Labelled(CHOSEN, CLASSES, classes=3), everything(), HeadShape("epinet"))
    with pytest.raises(UsageError, match="classes of 2 or more"):
        Labelled(CHOSEN, CLASSES, classes=1)


@pytest.mark.parametrize("kind", ["linear", "mlp", "epinet"])
@pytest.mark.parametrize("prior", ["none", "linear", "mlp"])
def test_folded_heads_score_as_unfolded_ones(kind, prior):
    shape = HeadShape(kind, hidden=4, prior=prior, prior_scale=2.0, prior_hidden=3)
    model = TrainedHeads(7, 6, shape, torch.randn(6, generator=DRAW), torch.full((6,), 0.3), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=DRAW))
        scaled = (CHOSEN - model.shift) * model.scale
        unfolded = model.trained(scaled) + model.frozen(scaled)
    folded = model.fold()
    assert (folded(CHOSEN) - unfolded).abs().max() < 1e-5 * unfolded.abs().max()
    assert unfolded.std(1).min() > 0.01  # the heads differ
    assert folded.spec.architecture == ("linear" if kind == "linear" and prior != "mlp" else "mlp")


def test_an_epinet_is_the_formula_of_its_paper():
    """f(x, z) = base(x) + z . g(x, z) + s z . p(x, z) with one hidden layer, at the K draws of z."""
    shape = HeadShape("epinet", hidden=4, prior="mlp", prior_hidden=3, index_size=2)
    model = TrainedHeads(5, 6, shape, torch.zeros(6), torch.ones(6), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=DRAW))
        for k in range(5):
            z = model.index[k]
            inner = (CHOSEN @ model.inner.T + z @ model.inner_index.T + model.inner_bias).relu()
            trained = CHOSEN @ model.weight[0] + model.bias[0] + inner @ model.out.T @ z
            assert model.trained(CHOSEN)[:, k] == pytest.approx(trained, abs=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "epinet"])
def test_hidden_units_learn_what_a_linear_head_cannot(kind):
    x = torch.randn(400, 3, generator=DRAW)
    y = (x[:, 0] * x[:, 1] > 0).float()
    examples, plan = Labelled(x, y, classes=2), everything(3, 400)
    shape = HeadShape(kind, hidden=32)
    head = fit_heads(examples, plan, shape, FitSettings(steps=600, lr=0.02, batch_size=100))
    flat = fit_heads(examples, plan)
    right = ((head(x) > 0).float() == y[:, None]).float().mean()
    assert right > 0.85 > ((flat(x) > 0).float() == y[:, None]).float().mean() + 0.15


def test_a_linear_prior_is_absorbed_and_an_mlp_prior_is_not():
    """The trap of the method's name: a linear head takes a linear prior back, and all heads are the same."""

    def spread(prior):
        head = fit_heads(PAIRS, everything(20), HeadShape(prior=prior), FitSettings(l2=1e-5, steps=2000))
        return float((head(CHOSEN) - head(REJECTED)).std(1).mean())

    assert spread("linear") < 0.2 * spread("mlp")


def test_the_same_seed_gives_the_same_heads():
    shape, settings = HeadShape("mlp", prior="mlp"), FitSettings(steps=20, batch_size=16, seed=5)
    first, again = (fit_heads(PAIRS, everything(3), shape, settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_bad_features_are_refused():
    broken = CHOSEN.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        fit_heads(Pairs(broken, REJECTED), everything())
    with pytest.raises(DataError, match="all features are the same"):
        fit_heads(Pairs(CHOSEN, CHOSEN), everything())
    with pytest.raises(DataError, match="expected 80 rows"):
        fit_heads(Pairs(CHOSEN[:5], REJECTED[:5]), everything())
    with pytest.raises(UsageError, match="expected heads out of"):
        HeadShape("deep")
