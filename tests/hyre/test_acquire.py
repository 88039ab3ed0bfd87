"""Acquisition against numbers worked out by hand, explicit loops and another library's least squares."""

import math
import statistics

import numpy as np
import pytest

from llmrl.errors import DataError
from llmrl.hyre.acquire import CRITERIA, choose_batch, scores, should_stop


def logit(p):
    return math.log(p / (1 - p))


def h(p):
    """Entropy of a coin, in nats."""
    return 0.0 if p in (0.0, 1.0) else -p * math.log(p) - (1 - p) * math.log(1 - p)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def entropy_of(weights):
    return -sum(w * math.log(w) for w in weights if w > 0)


def drop_by_loops(margins, weights, beta, loss):
    """The expected drop of the weights' entropy, one pair, as it is defined."""
    expected = 0.0
    for sign in (1, -1):
        probability = sum(w * sigmoid(sign * f) for w, f in zip(weights, margins, strict=True))
        likelihoods = []
        for f in margins:
            one = math.log(1 + math.exp(-sign * f)) if loss == "nll" else (0.5 if f == 0 else float(sign * f < 0))
            likelihoods.append(math.exp(-beta * one))
        new = [w * a for w, a in zip(weights, likelihoods, strict=True)]
        expected += probability * (entropy_of(weights) - entropy_of([v / sum(new) for v in new]))
    return expected


@pytest.fixture
def world():
    rng = np.random.default_rng(3)
    return rng.normal(size=(7, 5)) * 2, rng.dirichlet(np.ones(5))


# two heads: on pair 0 they disagree (.9 and .1), on pair 1 both are unsure, on pair 2 both are sure, on pair 3 one is (.8, .5)
TOY = np.array([[logit(0.9), logit(0.1)], [0.0, 0.0], [logit(0.9), logit(0.9)], [logit(0.8), 0.0]])


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("entropy", [math.log(2), math.log(2), h(0.9), h(0.65)]),
        ("bald", [math.log(2) - h(0.9), 0, 0, h(0.65) - (h(0.8) + math.log(2)) / 2]),
        ("information", [math.log(2) - h(0.9), 0, 0, h(0.65) - (h(0.8) + math.log(2)) / 2]),
        ("variance", [logit(0.9) ** 2, 0, 0, (logit(0.8) / 2) ** 2]),
        ("weighted_variance", [logit(0.9) ** 2, 0, 0, (logit(0.8) / 2) ** 2]),
        ("margin", [0.5, 0.5, 0.1, 1 - sigmoid(logit(0.8) / 2)]),
    ],
)
def test_scores_of_two_heads_in_closed_form(criterion, expected):
    np.testing.assert_allclose(scores(criterion, TOY, [0.5, 0.5]), expected, atol=1e-15)


def test_scores_with_unequal_weights_in_closed_form():
    weights = [0.75, 0.25]
    mean = 0.75 * 0.9 + 0.25 * 0.1
    assert scores("entropy", TOY, weights)[0] == pytest.approx(h(mean), abs=1e-14)
    assert scores("bald", TOY, weights)[0] == pytest.approx(h(mean) - h(0.9), abs=1e-14)
    assert scores("margin", TOY, weights)[0] == pytest.approx(sigmoid(-logit(0.9) / 2), abs=1e-14)
    # values +-a with weights 3/4 and 1/4: variance 4 a^2 (3/4)(1/4); unweighted a^2
    assert scores("weighted_variance", TOY, weights)[0] == pytest.approx(0.75 * logit(0.9) ** 2, abs=1e-14)
    assert scores("variance", TOY, weights)[0] == pytest.approx(logit(0.9) ** 2, abs=1e-14)


def test_scores_entropy_keeps_a_side_that_is_all_but_impossible():
    q = math.exp(-50)  # the other side; p = 1 - q rounds to 1
    assert scores("entropy", [[50.0, 50.0]], [0.5, 0.5])[0] == pytest.approx(50 * q + q, rel=1e-12, abs=0)


def test_scores_variance_is_that_of_the_standard_library(world):
    margins, weights = world
    np.testing.assert_allclose(scores("variance", margins, weights), [statistics.pvariance(row) for row in margins])


@pytest.mark.parametrize("loss", ["nll", "zero_one"])
@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_scores_information_is_the_drop_by_explicit_loops(world, beta, loss):
    margins, weights = world
    margins[2, 1] = 0.0  # a tie
    expected = [drop_by_loops(row, weights, beta, loss) for row in margins]
    np.testing.assert_allclose(scores("information", margins, weights, beta=beta, loss=loss), expected, atol=1e-13)


def test_scores_information_is_bald_where_the_update_is_bayes_rule(world):
    margins, weights = world
    np.testing.assert_allclose(
        scores("information", margins, weights), scores("bald", margins, weights), rtol=1e-10, atol=1e-14
    )
    assert np.abs(scores("information", margins, weights, beta=3) - scores("bald", margins, weights)).max() > 0.01


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_finite_and_within_bounds_for_huge_margins(criterion):
    margins = np.array([[1e4, -1e4, 1e4], [800.0, 800.0, 800.0], [0.0, 1e-300, -1e-300]])
    for weights in ([1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [1 - 1e-300, 1e-300, 0.0]):
        found = scores(criterion, margins, weights, beta=3.0)
        assert np.isfinite(found).all()
        assert (found >= (-1e-12 if criterion == "information" else 0)).all()
        if criterion in ("entropy", "bald", "information"):
            assert (found <= math.log(3) + 1e-12).all()


def test_scores_of_one_live_head_know_that_nothing_is_left_to_learn(world):
    margins, _ = world
    weights = np.eye(5)[2]
    for criterion in ("bald", "information", "weighted_variance"):
        np.testing.assert_allclose(scores(criterion, margins, weights), 0, atol=1e-14)
    np.testing.assert_allclose(scores("entropy", margins, weights), [h(sigmoid(f)) for f in margins[:, 2]])


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "random"])
def test_scores_of_many_users_are_those_of_each(criterion):
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(4), size=(2, 3))
    own, shared = rng.normal(size=(2, 3, 6, 4)), rng.normal(size=(6, 4))
    for margins in (own, shared):
        found = scores(criterion, margins, weights, beta=0.7)
        assert found.shape == (2, 3, 6)
        for u in np.ndindex(2, 3):
            alone = scores(criterion, margins[u] if margins.ndim == 4 else margins, weights[u], beta=0.7)
            np.testing.assert_allclose(found[u], alone, atol=1e-13)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "random"])
def test_scores_do_not_depend_on_which_answer_stands_first(criterion, world):
    margins, weights = world
    turned = margins * np.array([1, -1, 1, -1, -1, 1, -1])[:, None]
    np.testing.assert_allclose(
        scores(criterion, turned, weights, beta=2), scores(criterion, margins, weights, beta=2), atol=1e-14
    )


def test_scores_random_is_one_order_a_seed_and_another_for_every_user(world):
    margins, weights = world
    found = scores("random", margins, weights, seed=1)
    np.testing.assert_array_equal(found, scores("random", margins, np.full(5, 0.2), seed=1))
    assert (found != scores("random", margins, weights, seed=2)).all()
    users = scores("random", margins, np.tile(weights, (50, 1)), seed=1)
    assert len({tuple(row.argsort()) for row in users}) > 40
    assert found.min() >= 0
    assert found.max() < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"criterion": "varience"}, "did you mean 'variance'"),
        ({"weights": np.ones(4) / 4}, "expected margins"),
        ({"margins": np.full((7, 5), np.nan)}, "not finite"),
        ({"criterion": "information", "loss": "squared"}, "nll or zero_one"),
    ],
)
def test_scores_refuses(world, change, words):
    given = {"criterion": "bald", "margins": world[0], "weights": world[1], **change}
    with pytest.raises(DataError, match=words):
        scores(**given)


def unexplained(row, picked, weights):
    """1 - R^2 of a weighted regression with an intercept, by least squares."""
    root = np.sqrt(weights)
    x = np.column_stack([np.ones(len(row)), *picked]) * root[:, None]
    fitted = x @ np.linalg.lstsq(x, row * root, rcond=None)[0]
    mean = weights @ row
    return ((row * root - fitted) ** 2).sum() / (weights @ (row - mean) ** 2)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_choose_batch_is_the_greedy_rule_by_least_squares(criterion):
    rng = np.random.default_rng(5)
    margins, weights = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 9)) + 0.3 * rng.normal(size=(12, 9)), None
    weights = rng.dirichlet(np.ones(9))
    worth, picked = scores(criterion, margins, weights), []
    for _ in range(5):
        left = [i for i in range(12) if i not in picked and i != 4]
        picked.append(
            max(left, key=lambda i: worth[i] * (unexplained(margins[i], margins[picked], weights) if picked else 1))
        )
    assert choose_batch(criterion, margins, weights, 5, taken=[4]).tolist() == picked


def test_choose_batch_leaves_out_copies_that_the_criterion_alone_would_ask():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 20)) * np.array([[3], [2], [1]])
    # a copy, a copy with its sides swapped, one scaled and shifted: they rank the heads the same way
    margins = np.array([a, -a, 0.9 * a + 1, b, -b, c])
    uniform = np.full(20, 1 / 20)
    assert set(np.argsort(-scores("variance", margins, uniform))[:3]) == {0, 1, 2}
    assert choose_batch("variance", margins, uniform, 3).tolist() == [0, 3, 5]
    assert choose_batch("variance", margins, uniform, 9).tolist() == [0, 3, 5, 1, 2, 4]  # then the copies, by score


@pytest.mark.parametrize("criterion", CRITERIA)
def test_choose_batch_of_one_is_the_best_by_the_criterion(criterion, world):
    margins, weights = world
    worth = scores(criterion, margins, weights, beta=3)
    order = np.argsort(-worth)
    assert choose_batch(criterion, margins, weights, 1, beta=3).tolist() == [order[0]]
    assert choose_batch(criterion, margins, weights, 1, beta=3, taken=order[:2]).tolist() == [order[2]]
    assert choose_batch(criterion, margins, weights, 3, taken=range(7)).tolist() == []


def test_choose_batch_takes_copies_in_the_order_of_the_score():
    row = np.random.default_rng(0).normal(size=20)
    sizes = np.array([3, -1, 8, 2, -7, 4, 6, -5])
    found = choose_batch("variance", np.outer(sizes, row), np.full(20, 1 / 20), 8)
    assert np.abs(sizes[found]).tolist() == [8, 7, 6, 5, 4, 3, 2, 1]


def test_choose_batch_leaves_out_copies_where_information_is_negative():
    # nearly certain, and an update that over-reacts: every label is expected to add doubt
    weights = np.array([0.97, 0.02, 0.01])
    margins = np.array([[0.5, 3.0, 2.0], [0.5, 3.0, 2.0], [1.0, -2.0, 3.0], [0.5, -4.0, -4.0]])
    worth = scores("information", margins, weights, beta=3)
    assert worth.max() < -0.01
    assert np.argsort(-worth, kind="stable").tolist() == [0, 1, 2, 3]
    assert choose_batch("information", margins, weights, 2, beta=3).tolist() == [0, 2]


# one pair a row: head 0 prefers the first side everywhere, head 1 the second on the last two of 100 pairs
POOL = np.column_stack([np.ones(100), np.where(np.arange(100) < 98, 1.0, -1.0)])
FIRST, SECOND = [1.0, 0.0], [0.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([FIRST] * 5, False),  # four labels
        ([FIRST] * 6, True),  # five
        ([SECOND] + [FIRST] * 5, False),  # the fifth last label moved 2 %
        ([SECOND] * 3 + [FIRST] * 6, True),  # what came before the window does not count
        ([FIRST] * 4 + [SECOND] + [FIRST] * 2, False),  # there and back within it
        ([FIRST] * 8 + [SECOND], False),  # the last one did
    ],
)
def test_should_stop_when_the_last_five_labels_changed_nothing(weights, expected):
    assert should_stop(POOL, weights) is expected


def test_should_stop_takes_a_share_and_a_window():
    weights = [FIRST] * 4 + [SECOND] * 2
    assert not should_stop(POOL, weights)
    assert not should_stop(POOL, weights, share=0.0199)
    assert should_stop(POOL, weights, share=0.02)
    assert should_stop(POOL, weights, window=1)
    for pool, window in ((POOL[:0], 5), (POOL, 0), (POOL[:, :1], 5)):
        with pytest.raises(DataError, match="window of at least 1"):
            should_stop(pool, weights, window=window)
