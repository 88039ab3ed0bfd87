from dataclasses import replace

import pytest
from small_world import candidate

from llmrl.errors import UsageError
from llmrl.leret.records import Group
from llmrl.leret.returns import future_return, propagate

FUTURES = [[0.3, 0.8], [0.6], []]  # two more hops, one, none (it stopped)


@pytest.mark.parametrize(
    ("how", "discount", "expected"),
    [
        ("greedy", 0.5, 0.5),
        ("best", 1.0, 0.8),
        ("mean", 1.0, (0.8 + 0.6 + 0.5) / 3),
        ("best", 0.5, 0.5),  # 0.25 * 0.8, 0.5 * 0.6, 0.5
        ("mean", 0.5, (0.2 + 0.3 + 0.5) / 3),
    ],
)
def test_future_return(how, discount, expected):
    assert future_return(0.5, FUTURES, how, discount) == pytest.approx(expected)


@pytest.mark.parametrize("how", ["greedy", "best", "mean"])
def test_future_return_of_the_last_hop_is_the_reward(how):
    assert future_return(0.5, [], how, 0.5) == 0.5


@pytest.fixture
def tree():
    """A question with hop-1 queries a (0.25), b (0.5), c (0.5) and d (all found, 0.9); a and b were explored further.

    a leads to 0.75 and 1.0, b to 0.5 alone; c was not explored.
    """
    a, b, c = (candidate(v, query=name) for name, v in (("a", 0.25), ("b", 0.5), ("c", 0.5)))
    a, b, c = (replace(x, sample=i) for i, x in enumerate((a, b, c)))
    d = replace(candidate(0.9, query="d", recall=1.0), sample=3)
    first = Group((("g",),), (a, b, c, d))
    after_a = Group((("g",),), tuple(candidate(v, state=a.state_after, sample=i) for i, v in enumerate((0.75, 1.0))))
    after_b = Group((("g",),), (candidate(0.5, state=b.state_after),))
    return [first, after_b, after_a]


def returns(groups):
    return [{c.query: c.ret for c in group.candidates} for group in groups]


def test_propagate_greedy_is_the_reward(tree):
    shifted = [replace(g, candidates=tuple(replace(c, ret=9.0) for c in g.candidates)) for g in tree]
    assert returns(propagate(shifted, "greedy"))[0] == {"a": 0.25, "b": 0.5, "c": 0.5, "d": 0.9}


@pytest.mark.parametrize(
    ("how", "discount", "expected"),
    [
        ("best", 1.0, {"a": 1.0, "b": 0.5, "d": 0.9}),
        ("mean", 1.0, {"a": 0.875, "b": 0.5, "d": 0.9}),
        ("best", 0.8, {"a": 0.8, "b": 0.4, "d": 0.9}),  # d needs no further hop
    ],
)
def test_propagate_takes_futures_and_leaves_out_what_was_not_explored(tree, how, discount, expected):
    first, *later = returns(propagate(tree, how, discount))
    assert first == pytest.approx(expected)
    assert later == [{"bare-0-0.5": 0.5}, {"bare-0-0.75": 0.75, "bare-1-1": 1.0}]  # the last hop keeps its rewards


def test_propagate_reaches_over_two_hops_and_does_not_depend_on_order(tree):
    first, after_b, after_a = tree
    best = after_a.candidates[1]
    third = Group((("g",),), (candidate(0.2, state=best.state_after),))
    groups = [first, after_b, after_a, third]
    forward, backward = propagate(groups, "best", 0.5), propagate(groups[::-1], "best", 0.5)
    # a -> 0.5 * (0.5 * 0.2); the sibling of `best` was not explored and is no future of a
    assert returns(forward)[0] == pytest.approx({"a": 0.05, "b": 0.25, "d": 0.9})
    assert returns(forward)[2] == {"bare-1-1": 0.1}
    assert forward == backward[::-1]


def test_propagate_refuses_unknown_words_and_discounts(tree):
    with pytest.raises(UsageError, match="unknown returns 'bst'; did you mean 'best'"):
        propagate(tree, "bst")
    with pytest.raises(UsageError, match="discount"):
        future_return(0.5, [], "best", 1.5)
