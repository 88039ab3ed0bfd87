import numpy as np
import pytest

from llmrl.errors import DataError
from llmrl.hyre.baselines import Labels, fit_all, lore_weights
from llmrl.hyre.evaluate import Resample, UserPairs, accuracies, crossover, harm, keys_of, split, table
from llmrl.hyre.metrics import accuracy, collapse_warning, disagreement
from llmrl.hyre.pairs import Pair
from llmrl.hyre.reliability import calibration, held_margins, reliability_bins

RNG = np.random.default_rng(4)
HEADS = RNG.normal(size=(20, 8))


def user(direction, name="u", pairs=200):
    features = RNG.normal(size=(pairs, 8))
    features *= np.sign(features @ direction)[:, None]  # the user prefers the first of each pair
    margins = features @ HEADS.T
    starts = {
        name: features @ v for name, v in (("mean", HEADS.mean(0)), ("single", HEADS[0]), ("average", HEADS.mean(0)))
    }
    keys = np.stack([np.arange(pairs), np.arange(pairs)], 1)
    return UserPairs(name, margins, features, starts, keys)


def test_labels_and_tests_share_no_answer():
    texts = [f"t{i}" for i in range(20)]
    pairs = [Pair((), *RNG.permutation(texts)[:2].tolist()) for _ in range(300)]
    keys = keys_of(pairs)
    labels, tests = split(keys, np.random.default_rng(0))
    assert len(labels) > 40
    assert len(tests) > 40
    assert not set(keys[labels].ravel()) & set(keys[tests].ravel())


def test_labels_and_tests_share_no_prompt():
    pairs = [Pair((("user", f"q{i % 9}"),), f"a{i}", f"b{i}") for i in range(90)]
    labels, tests = split(keys_of(pairs), np.random.default_rng(0))
    assert len(labels) + len(tests) == 90
    assert not {i % 9 for i in labels.tolist()} & {i % 9 for i in tests.tolist()}


def test_a_user_like_one_head_is_found():
    found = table([user(HEADS[3]), user(HEADS[7])], sizes=(1, 5, 20), draws=10, bootstrap=100)
    at = {name: of["20"]["value"] for name, of in found["methods"].items() if "20" in of}
    assert at["hyre"] > 0.9
    assert found["paired"]["hyre - uniform"]["20"]["low"] > 0.1
    assert found["paired"]["refine - hyre"]["5"]["value"] > -0.05
    assert found["methods"]["oracle-head"]["0"]["value"] > 0.95
    assert found["sizes"] == [1, 5, 20]
    assert set(found["per_user"]["hyre"]) == {"u"}


def test_a_user_unlike_all_heads_gains_nothing():
    """Labels at random: no method is above chance."""
    nobody = user(HEADS[3])
    signs = RNG.choice([-1.0, 1.0], size=200)
    noise = UserPairs(
        "n",
        nobody.margins * signs[:, None],
        nobody.features * signs[:, None],
        {name: start * signs for name, start in nobody.starts.items()},
        nobody.keys,
    )
    found = table([noise], sizes=(20,), draws=20, bootstrap=100)
    assert all(
        abs(found["methods"][name]["20"]["value"] - 0.5) < 0.08
        for name in ("hyre", "refine", "lore", "pref", "finetune")
    )


def test_sizes_that_a_user_has_no_pairs_for_are_left_out():
    found = table([user(HEADS[3]), user(HEADS[4], pairs=60)], sizes=(1, 5, 64), draws=3, bootstrap=100)
    assert found["sizes"] == [1, 5]
    assert "64" not in found["methods"]["hyre"]


def test_too_few_pairs_are_refused():
    with pytest.raises(DataError, match="more pairs are needed"):
        accuracies(user(HEADS[0], pairs=12), (1,), 2, 0)


def test_lore_follows_the_gradient_of_the_likelihood():
    """One step of Adam moves every logit by the rate, up where more weight helps; many steps reach the best head."""
    margins = np.array([[[2.0, -1.0, 0.0]] * 4])
    one = lore_weights(margins, steps=1, lr=0.1)[0]
    assert np.log(one[0] / one[1]) == pytest.approx(0.2, abs=1e-3)
    assert lore_weights(margins, steps=500)[0, 0] > 0.95


def test_every_method_sees_the_same_labels():
    labels = Labels(np.ones((2, 3, 4)), np.ones((2, 3, 5)), {"mean": np.ones((2, 3))})
    found = fit_all(labels)
    assert {name.split(" ")[0] for name in found} == {
        "hyre", "best-head", "hyre-auto", "lore", "pref", "refine", "finetune-zero", "finetune-mean",
    }  # fmt: skip
    assert found["hyre"].weights.tolist() == [[0.25] * 4] * 2  # heads that agree share the weight


def test_harm_and_crossover():
    before, after = np.array([[0.5, 0.5], [0.8, 0.8]]), np.array([[0.7, 0.7], [0.7, 0.7]])
    assert harm(after, before) == pytest.approx({"share": 0.5, "mean": 0.05 / 0.65})
    values = {("hyre", n): np.full((1, 1), 0.8) for n in (1, 5, 20)}
    values |= {("finetune", n): np.full((1, 1), v) for n, v in ((1, 0.9), (5, 0.7), (20, 0.85))}
    assert crossover(values, [1, 5, 20]) == 20
    assert crossover(values, [1, 5]) is None


def test_users_of_one_name_are_resampled_together():
    """Two users with one value each: as one cluster their mean has no spread but that of draws."""
    values = np.array([[0.0] * 4, [1.0] * 4])
    apart = Resample(2, 4, 500, 0).interval(values)
    together = Resample(2, 4, 500, 0, ["a", "a"]).interval(values)
    assert (apart["low"], apart["high"]) == (0.0, 1.0)
    assert (together["low"], together["high"]) == (0.5, 0.5)


def test_disagreement_by_hand():
    margins = np.array([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    # first pair: of 6 pairs of heads 4 disagree; second: none
    assert disagreement(margins) == pytest.approx(4 / 6 / 2)
    assert disagreement(margins[:, :1]) == 0
    assert accuracy([[1.0, 0.0], [-1.0, 1.0]]).tolist() == [0.5, 0.75]
    assert collapse_warning(0.2, 10) is None
    assert "disagree on 4.0%" in collapse_warning(0.04, 10)
    assert "one head" in collapse_warning(0.0, 1)


def test_reliability_bins_by_hand():
    margins = np.log(
        [0.9 / 0.1] * 9 + [0.1 / 0.9] + [0.6 / 0.4] * 10
    )  # 90% sure and right 9 of 10 times; 60% sure and always right
    confidence, right, error = reliability_bins(margins)
    assert confidence == pytest.approx([0.6, 0.9])
    assert right == pytest.approx([1.0, 0.9])
    assert error == pytest.approx(0.5 * 0.4)


def test_calibration_by_hand():
    """One head that is sure at odds of 3 to 1 and right on three pairs of four; n labels do not move a single head."""
    one = user(HEADS[3])
    margins = np.where(np.arange(200) % 4, 1.0, -1.0)[:, None] * np.log(3)
    sure = UserPairs("s", margins, one.features, one.starts, one.keys)
    found = calibration([sure], (5,), 20, 0)
    assert found["5"] == found["0"]
    assert found["0"]["ece"] < 0.02
    assert found["0"]["nll"] == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), abs=0.02)
    assert found["0"]["brier"] == pytest.approx(0.75 * 0.25, abs=0.01)


def test_labels_of_a_user_make_the_probabilities_of_that_user_better():
    found = calibration([user(HEADS[3]), user(HEADS[7])], (1, 20), 20, 0)
    assert found["20"]["nll"] < found["1"]["nll"] < found["0"]["nll"]
    assert found["20"]["brier"] < found["0"]["brier"]


def test_users_and_sizes_without_enough_pairs_are_named():
    found = table([user(HEADS[3], "a"), user(HEADS[4], "b", pairs=12)], sizes=(1, 5, 128), draws=3, bootstrap=100)
    assert (found["users"], found["users_left_out"], found["sizes_left_out"]) == (1, ["b"], [128])
    with pytest.raises(DataError, match="no user has pairs for 128 labels"):
        table([user(HEADS[3])], sizes=(128,), draws=3, bootstrap=100)
    with pytest.raises(DataError, match="more pairs are needed"):
        table([user(HEADS[3], pairs=12)], sizes=(1,), draws=3, bootstrap=100)


def test_users_count_alike_in_reliability():
    """A user of many pairs who is right, one of few who is wrong: half is right."""
    many, few = user(HEADS[3], pairs=200), user(HEADS[3], pairs=40)
    sides = [
        UserPairs(u.name, s * np.ones((len(u.keys), 1)), u.features, u.starts, u.keys)
        for u, s in ((many, 1), (few, -1))
    ]
    margins, weights = held_margins(sides, 0, 4)
    assert weights.sum() == pytest.approx(1)
    assert weights[margins > 0].sum() == pytest.approx(0.5)
    assert reliability_bins(margins, weights)[1] == pytest.approx([0.5])
