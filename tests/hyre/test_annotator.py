"""Simulated users against explicit loops over `HyrePosterior`, and against worlds whose outcome is known."""

import math
import time

import numpy as np
import pytest

from llmrl.errors import DataError
from llmrl.hyre.acquire import CRITERIA, scores
from llmrl.hyre.annotator import Annotator, query_curve
from llmrl.hyre.posterior import HyrePosterior


def make_world(users=4, pool=9, test=30, heads=6, width=5, seed=0):
    """Linear heads, and users who are mixtures of two of them."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(heads, width))
    tastes = np.stack([directions[rng.choice(heads, 2, replace=False)].sum(0) for _ in range(users)])
    x, t = rng.normal(size=(pool, width)), rng.normal(size=(test, width))
    return x @ directions.T, tastes @ x.T, t @ directions.T, tastes @ t.T


def test_annotator_without_noise_answers_by_the_sign_of_the_margin():
    margins = np.array([[2.0, -0.1], [-3.0, 0.4]])
    np.testing.assert_array_equal(Annotator(margins).labels(), [[1, 0], [0, 1]])
    np.testing.assert_array_equal(Annotator(margins, flip=1.0).labels(), [[0, 1], [1, 0]])


def test_annotator_errs_as_often_as_it_is_told():
    n = 40_000
    ones = np.ones(n)
    assert Annotator(ones, flip=0.2).labels().mean() == pytest.approx(0.8, abs=4 * 0.4 / n**0.5)
    assert Annotator(0 * ones).labels().mean() == pytest.approx(0.5, abs=2 / n**0.5)  # a tie is a coin
    # Bradley and Terry: 1 / (1 + e^-(2 * 0.7))
    p = 1 / (1 + math.exp(-1.4))
    assert Annotator(0.7 * ones, scale=2.0).labels().mean() == pytest.approx(p, abs=2 / n**0.5)
    both = Annotator(0.7 * ones, scale=2.0, flip=0.1).labels().mean()
    assert both == pytest.approx(0.9 * p + 0.1 * (1 - p), abs=2 / n**0.5)


def test_annotator_says_the_same_when_asked_again_and_something_else_with_another_seed():
    margins = np.random.default_rng(0).normal(size=(3, 200))
    one = Annotator(margins, flip=0.3, seed=1)
    np.testing.assert_array_equal(one.labels(), one.labels())
    assert (one.labels() != Annotator(margins, flip=0.3, seed=2).labels()).any()


@pytest.mark.parametrize("given", [{"flip": 1.5}, {"flip": -0.1}, {"scale": -1.0}, {"margins": [1.0, float("nan")]}])
def test_annotator_refuses(given):
    with pytest.raises(DataError, match="expected"):
        Annotator(**{"margins": [1.0], **given})


def curve_by_loops(margins, labels, test, truth, criterion, queries, beta, loss, prior=None):
    posterior = HyrePosterior(margins.shape[1], beta=beta, loss=loss, prior=prior)
    asked, accuracy = [], []
    for _ in range(queries + 1):
        right = 0.0
        for row, true in zip(test, truth, strict=True):
            predicted = sum(w * f for w, f in zip(posterior.weights, row, strict=True))
            right += 0.5 if predicted == 0 else float((predicted > 0) == (true > 0))
        accuracy.append(right / len(test))
        if len(asked) == queries:
            return accuracy, asked, posterior.weights
        worth = scores(criterion, margins, posterior.weights, beta=beta, loss=loss)
        best = max((i for i in range(len(margins)) if i not in asked), key=lambda i: worth[i])
        asked.append(best)
        posterior.update(margins[best], labels[best])
    raise AssertionError


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "random"])
def test_query_curve_is_that_of_each_user_by_loops(criterion, shared):
    margins, true, test, truth = make_world()
    if not shared:
        rng = np.random.default_rng(1)
        margins, test = (m + rng.normal(size=(4, *m.shape)) for m in (margins, test))
    labels = Annotator(true, flip=0.2, seed=3).labels()
    prior = np.array([0.3, 0.1, 0.1, 0.2, 0.2, 0.1])
    for beta, loss in ((1.0, "nll"), (2.0, "zero_one")):
        found = query_curve(
            margins, labels, test, truth, criterion=criterion, queries=6, beta=beta, loss=loss, prior=prior
        )
        for u in range(4):
            own, own_test = (margins, test) if shared else (margins[u], test[u])
            accuracy, asked, weights = curve_by_loops(
                own, labels[u], own_test, truth[u], criterion, 6, beta, loss, prior
            )
            assert found.asked[u].tolist() == asked
            np.testing.assert_allclose(found.accuracy[u], accuracy, atol=1e-12)
            np.testing.assert_allclose(found.weights[u, -1], weights, atol=1e-12)


def test_query_curve_takes_users_in_any_shape():
    margins, true, test, truth = make_world(users=6)
    labels = Annotator(true).labels()
    flat = query_curve(margins, labels, test, truth, criterion="bald", queries=3)
    shaped = query_curve(margins, labels.reshape(2, 3, 9), test, truth.reshape(2, 3, 30), criterion="bald", queries=3)
    alone = query_curve(margins, labels[4], test, truth[4], criterion="bald", queries=3)
    assert flat.accuracy.shape == (6, 4)
    assert flat.weights.shape == (6, 4, 6)
    np.testing.assert_allclose(shaped.accuracy.reshape(6, 4), flat.accuracy)
    np.testing.assert_array_equal(shaped.asked.reshape(6, 3), flat.asked)
    np.testing.assert_allclose(alone.accuracy, flat.accuracy[4])
    np.testing.assert_array_equal(alone.asked, flat.asked[4])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_query_curve_asks_no_pair_twice_and_begins_at_the_uniform_ensemble(criterion):
    margins, true, test, truth = make_world(users=5)
    found = query_curve(margins, Annotator(true).labels(), test, truth, criterion=criterion, queries=9)
    np.testing.assert_array_equal(np.sort(found.asked, -1), np.tile(np.arange(9), (5, 1)))
    uniform = ((test.mean(1) > 0) == (truth > 0)).mean(1)
    np.testing.assert_allclose(found.accuracy[:, 0], uniform)


def test_query_curve_counts_a_prediction_of_no_side_as_half():
    margins, test = np.array([[1.0, -1.0]]), np.array([[1.0, -1.0], [1.0, 1.0], [1.0, 1.0]])
    found = query_curve(margins, [1.0], test, [1.0, 1.0, -2.0], criterion="bald", queries=1)
    # the first test pair: a tie of the two heads, then the head that was right about the label
    np.testing.assert_allclose(found.accuracy, [1.5 / 3, 2 / 3])


def test_query_curve_finds_the_head_a_user_is_and_nothing_in_coin_tosses():
    rng = np.random.default_rng(0)
    margins, test = 5 * rng.normal(size=(40, 8)), 5 * rng.normal(size=(200, 8))
    who = np.arange(64) % 8
    labels = Annotator(margins.T[who]).labels()
    found = query_curve(margins, labels, test, test.T[who], criterion="bald", queries=20)
    assert found.accuracy[:, 0].mean() < 0.7
    assert found.accuracy[:, -1].min() > 0.97
    assert found.weights[np.arange(64), -1, who].min() > 0.9
    tosses = Annotator(margins.T[who], flip=0.5).labels()
    found = query_curve(margins, tosses, test, test.T[who], criterion="bald", queries=20)
    assert abs(found.accuracy[:, -1].mean() - 0.5) < 0.12


def test_query_curve_of_chosen_questions_beats_random_ones_over_many_users():
    names = ("random", "variance", "bald", "information")
    areas = {name: [] for name in names}
    for seed in range(3):  # a pool and an ensemble each
        margins, true, test, truth = make_world(users=300, pool=60, test=300, heads=100, width=20, seed=seed)
        margins, test = margins / 20**0.5, test / 20**0.5
        labels = Annotator(true, scale=0.5, seed=seed).labels()
        for name in names:
            found = query_curve(margins, labels, test, truth, criterion=name, queries=20, seed=seed)
            areas[name].append(found.accuracy.mean(1))
    random = np.concatenate(areas["random"])
    for name in names[1:]:
        difference = np.concatenate(areas[name]) - random
        assert difference.mean() > 2 * difference.std() / len(random) ** 0.5, name


@pytest.mark.parametrize("criterion", ["variance", "information"])
def test_query_curve_of_300_users_takes_seconds(criterion):
    margins, true, test, truth = make_world(users=300, pool=60, test=500, heads=100, width=20)
    labels = Annotator(true).labels()
    start = time.perf_counter()
    query_curve(margins, labels, test, truth, criterion=criterion, queries=20)
    assert time.perf_counter() - start < 20  # a second on one core


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"queries": 10}, "0 to 9 queries"),
        ({"labels": np.full((4, 9), 2.0)}, "labels of 1 and 0"),
        ({"labels": np.ones((4, 8))}, "expected margins"),
        ({"test_truth": np.ones((3, 30))}, "expected margins"),
        ({"test_truth": np.zeros((4, 30))}, "no better side"),
        ({"margins": np.full((9, 6), np.nan)}, "not finite"),
    ],
)
def test_query_curve_refuses(change, words):
    margins, true, test, truth = make_world()
    given = {"margins": margins, "labels": (true > 0) * 1.0, "test_margins": test, "test_truth": truth, "queries": 3}
    with pytest.raises(DataError, match=words):
        query_curve(**{**given, **change}, criterion="bald")
