"""Hard EM on pairs of twelve users with one of three tastes: the tastes are found."""

import numpy as np
import pytest
import torch

from llmrl.errors import DataError
from llmrl.hyre.em import em_plan
from llmrl.hyre.fit import FitSettings, Pairs, fit_heads

TASTES = 3.0 * np.eye(3, 8)


def users(count=12, pairs=24, seed=0):
    """Return pairs of users, user i with taste i % 3, and the users' names."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, count * pairs, 8))
    of = np.repeat(np.arange(count), pairs)
    won = ((a - b) * TASTES[of % 3]).sum(1) > 0
    chosen, rejected = np.where(won[:, None], a, b), np.where(won[:, None], b, a)
    return Pairs(torch.from_numpy(chosen).float(), torch.from_numpy(rejected).float()), [f"u{i:02}" for i in of]


def partition(plan, groups):
    """Return which users each head learns from, as a set of sets."""
    return {frozenset(np.asarray(groups)[row > 0].tolist()) for row in plan.rows}


@pytest.mark.parametrize("seed", range(4))
def test_users_of_one_taste_end_up_with_one_head(seed):
    examples, groups = users()
    plan = em_plan(examples, 3, groups=groups, seed=seed)
    assert partition(plan, groups) == {frozenset(f"u{i:02}" for i in range(k, 12, 3)) for k in range(3)}
    assert plan.rows.sum(1) == pytest.approx(np.ones(3), abs=1e-5)
    assert sorted(plan.names)[0] == "+u00 +u03 +u06 +u09"
    head = fit_heads(examples, plan)
    directions = torch.nn.functional.normalize(head.weight, dim=1) @ torch.from_numpy(TASTES[:3] / 3).float().T
    assert sorted(directions.argmax(1).tolist()) == [0, 1, 2]
    assert float(directions.max(1).values.min()) > 0.9


def test_every_head_has_a_group_even_where_there_are_fewer_tastes():
    examples, groups = users()
    plan = em_plan(examples, 8, groups=groups)
    assert (plan.rows.sum(1) > 0.99).all()
    assert sum(len(part) for part in partition(plan, groups)) == 12


def test_without_groups_clusters_of_pairs_stand_for_them():
    examples, _ = users()
    plan = em_plan(examples, 3)
    assert plan.rows.shape == (3, 288)
    assert ((plan.rows > 0).sum(0) == 1).all()  # each pair belongs to one head
    assert all(name.startswith("+cluster ") for name in plan.names)
    few, _ = users(count=3, pairs=20)  # clusters of one pair go to a neighbour
    assert ((em_plan(few, 10).rows > 0).sum(0) == 1).all()
    with pytest.raises(DataError, match=r"20 heads for 1. clusters of pairs.*--diversity cluster"):
        em_plan(few, 20)


def test_a_seed_gives_the_same_plan():
    examples, groups = users()
    assert (em_plan(examples, 4, groups=groups, seed=1).rows == em_plan(examples, 4, groups=groups, seed=1).rows).all()


def test_what_cannot_be_shared_out_is_refused():
    examples, groups = users()
    with pytest.raises(DataError, match="13 heads for 12 groups"):
        em_plan(examples, 13, groups=groups)
    lonely = ["alone", *groups[1:]]
    with pytest.raises(DataError, match="'alone' has one"):
        em_plan(examples, 3, groups=lonely, settings=FitSettings())
