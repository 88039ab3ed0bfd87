from types import SimpleNamespace

import pytest
from small_world import HOP_1, QUESTION, search, tried

from llmrl.errors import DataError, UsageError
from llmrl.leret.context import SearchState, extend, merge, up_to


def hits(**scores):
    return [SimpleNamespace(id=name, score=score) for name, score in scores.items()]


@pytest.fixture
def two_hops():
    """b comes back in hop 2 with a better score and a worse rank; x is new at the top."""
    state = extend(SearchState("q"), "first", hits(a=5.0, b=4.0, c=3.0))
    return extend(state, "second", hits(x=4.5, y=4.2, b=4.1))


def test_extend_adds_a_hop_and_leaves_the_state_before_alone(two_hops):
    assert two_hops.hop == 2
    assert two_hops.queries == ("first", "second")
    assert two_hops.hops == (("a", "b", "c"), ("x", "y", "b"))
    assert two_hops.scores[1] == (4.5, 4.2, 4.1)
    assert two_hops.seen == {"a", "b", "c", "x", "y"}
    assert up_to(two_hops, 1).hops == (("a", "b", "c"),)
    assert SearchState("q").hop == 0


def test_extend_keeps_the_first_of_a_passage_returned_twice():
    double = [*hits(a=3.0, b=2.0), *hits(a=1.0)]
    assert extend(SearchState("q"), "w", double).hops == (("a", "b"),)
    assert extend(SearchState("q"), "w", double).scores == ((3.0, 2.0),)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("hop_order", "a b c x y"),
        ("score", "a x y b c"),  # 5, 4.5, 4.2, then b at the better of 4 and 4.1, 3
        # b: 1/62 + 1/63; a and x: 1/61, a first; y: 1/62; c: 1/63
        ("rrf", "b a x y c"),
    ],
)
def test_merge_orders_by_its_rule(two_hops, rule, expected):
    assert merge(two_hops, rule) == tuple(expected.split())


@pytest.mark.parametrize("rule", ["hop_order", "score", "rrf"])
def test_merge_of_one_hop_is_that_hop_and_of_none_is_empty(two_hops, rule):
    assert merge(up_to(two_hops, 1), rule) == ("a", "b", "c")
    assert merge(SearchState("q"), rule) == ()
    assert merge(extend(SearchState("q"), "nothing", []), rule) == ()


@pytest.mark.parametrize(("rank", "first"), [(61, "b"), (62, "a")])
def test_merge_by_rrf_adds_sixty_to_the_rank(rank, first):
    # b twice at `rank` against a once at the top: 2 / (60 + rank) is above 1 / 61 up to 61, equal at 62
    def hop(top, filler):
        ids = [top, *(f"{filler}{i}" for i in range(rank - 2)), "b"]
        return hits(**dict.fromkeys(ids, 1.0))

    state = extend(extend(SearchState("q"), "1", hop("a", "x")), "2", hop("y", "z"))
    assert merge(state, "rrf")[0] == first


def test_merge_by_score_takes_negative_scores_and_keeps_ties_in_order():
    state = extend(extend(SearchState("q"), "1", hits(a=-2.0, b=-3.0)), "2", hits(c=-2.0, b=-1.0))
    assert merge(state, "score") == ("b", "a", "c")


def test_merge_refuses_an_unknown_rule_with_the_nearest():
    with pytest.raises(UsageError, match="unknown merge rule 'rff'; did you mean 'rrf'"):
        merge(SearchState("q"), "rff")


def test_key_names_question_queries_and_hits(two_hops):
    other = extend(up_to(two_hops, 1), "second", hits(x=1.0, y=1.0, b=1.0))
    assert other.key == two_hops.key  # scores are no part of what is shown
    different = [
        SearchState("q2", two_hops.queries, two_hops.hops, two_hops.scores),
        SearchState("q", ("first", "2nd"), two_hops.hops, two_hops.scores),
        extend(up_to(two_hops, 1), "second", hits(y=1.0, x=1.0, b=1.0)),
        up_to(two_hops, 1),
    ]
    assert len({two_hops.key, *(state.key for state in different)}) == 5
    assert SearchState("q").key == "b96520389c604fec"  # printf '["q", [], []]' | b2sum -l 64


def test_search_state_is_the_same_after_json(two_hops):
    assert SearchState.from_json(two_hops.to_json()) == two_hops
    with pytest.raises(DataError, match="unknown key 'hop'"):
        SearchState.from_json({**two_hops.to_json(), "hop": 2})


@pytest.mark.parametrize(
    ("queries", "hops", "scores", "words"),
    [
        (("a",), (), (), "1 queries, 0 hops, 0 scores"),
        (("a",), (("x", "y"),), ((1.0,),), "2 passages .2 different. and 1 scores"),
        (("a",), (("x", "x"),), ((1.0, 1.0),), "in hop 1, got 2 passages .1 different."),
    ],
)
def test_search_state_refuses_hops_that_do_not_fit(queries, hops, scores, words):
    with pytest.raises(DataError, match=words):
        SearchState("q", queries, hops, scores)


@pytest.mark.parametrize("query", HOP_1)
def test_small_world_returns_what_was_derived_by_hand(query):
    assert tuple(hit.id for hit in search(query)) == HOP_1[query][0]


@pytest.mark.parametrize(
    ("rule", "context", "ap"),
    [
        ("hop_order", "d5 d0 p0 p5", (1 + 2 / 4) / 2),
        ("score", "d5 d0 p0 p5", (1 + 2 / 4) / 2),  # 3, 2, 2, 1
        ("rrf", "d5 d0 p5 p0", (1 + 2 / 3) / 2),  # d5 twice at rank 1; d0 and p5 at rank 2; p0 at rank 3
    ],
)
def test_small_world_second_hop_finds_the_builder(rule, context, ap):
    first = tried(QUESTION)
    second = tried("freda", first.state_after, rule=rule)
    assert second.hits == ("d5", "p5")
    assert merge(second.state_after, rule) == tuple(context.split())
    assert second.ap == pytest.approx(ap)
    assert second.recall == 1
    assert second.hop == 2
