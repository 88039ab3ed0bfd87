import numpy as np
import pytest

from llmrl.errors import DataError
from llmrl.hyre.diversity import RECIPES, plan_heads

GROUPS = [f"g{i % 5}" for i in range(50)]
FEATURES = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def plan(recipe, heads=12, **changes):
    return plan_heads(recipe, heads, 50, **{"groups": GROUPS, "features": FEATURES, **changes})


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_head_has_rows_that_sum_to_one(recipe):
    found = plan(recipe)
    assert found.rows.shape == (12, 50)
    assert found.rows.sum(1) == pytest.approx(np.ones(12), abs=1e-5)
    assert (found.rows >= 0).all()
    assert len(found.names) == len(found.signs) == 12


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_seed_gives_the_same_plan_and_another_seed_another(recipe):
    assert (plan(recipe, seed=3).rows == plan(recipe, seed=3).rows).all()
    if recipe != "none":
        assert (plan(recipe, seed=3).rows != plan(recipe, seed=4).rows).any()


def test_a_head_of_a_group_sees_that_group_alone():
    found = plan("group", heads=10)
    for k, name in enumerate(found.names):
        seen = {GROUPS[i] for i in np.flatnonzero(found.rows[k])}
        assert seen == {name[1:]}
        assert (found.signs[k] < 0) == (name[0] == "-")
    assert sorted(name[1:] for name in found.names) == sorted([f"g{i}" for i in range(5)] * 2)


def test_the_share_of_turned_heads_is_exact():
    assert (plan("group", heads=100, flip=0.25).signs < 0).sum() == 25
    assert (plan("group", flip=0.0).signs > 0).all()


def test_a_group_that_comes_again_with_the_same_sign_is_drawn_anew():
    found = plan("group", heads=10, flip=0.0)
    by_name = {}
    for k, name in enumerate(found.names):
        by_name.setdefault(name, []).append(found.rows[k])
    assert all((first != again).any() for first, again in by_name.values())


def test_mixtures_lean_to_one_source():
    found = plan("mixture", heads=200, groups=[f"s{i % 2}" for i in range(50)])
    shares = found.rows[:, ::2].sum(1)
    assert 0.4 < shares.mean() < 0.6
    assert ((shares < 0.1) | (shares > 0.9)).mean() > 0.4


def test_clusters_are_of_features():
    """Sixteen heaps far from each other: no head splits one, and each head sees four."""
    heaps = np.arange(50) % 16
    spread = (np.eye(16, dtype=np.float32) * 90)[heaps] + 0.01 * np.random.default_rng(1).normal(size=(50, 16))
    found = plan("cluster", features=spread.astype(np.float32))
    for row in found.rows:
        seen = {heap: {bool(row[i]) for i in np.flatnonzero(heaps == heap)} for heap in range(16)}
        assert all(len(values) == 1 for values in seen.values())
        assert sum(True in values for values in seen.values()) == 4


@pytest.mark.parametrize(
    ("recipe", "given"),
    [("group", {"groups": None}), ("mixture", {"groups": None}), ("cluster", {"features": None}), ("x", {})],
)
def test_what_a_recipe_lacks_is_named(recipe, given):
    with pytest.raises(DataError):
        plan(recipe, **given)
