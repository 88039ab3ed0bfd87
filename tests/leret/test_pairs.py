import random
from collections import Counter
from dataclasses import replace

import pytest
from small_world import GOLD, QUESTION, candidate, group, hop_1, tried

from llmrl.errors import UsageError
from llmrl.leret.context import SearchState
from llmrl.leret.pairs import Pair, PairRule, best_queries, build_pairs, distinct_queries, group_pairs, jaccard
from llmrl.leret.records import Group

PAPER = PairRule()
ZEROS, QUARTER, HALF, ONE = ("born in", "dam built", "zzz"), "alder or foxglove dam", QUESTION, "foxglove freda born"


def texts(pairs):
    return {(pair.chosen, pair.rejected) for pair in pairs}


def named(*texts_and_values, gold=(("g",),), **fields):
    return Group(
        gold, tuple(candidate(v, query=text, sample=i, **fields) for i, (text, v) in enumerate(texts_and_values))
    )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("adjacent", {(QUARTER, z) for z in ZEROS} | {(HALF, QUARTER), (ONE, HALF)}),
        (
            "all",
            {(QUARTER, z) for z in ZEROS}
            | {(HALF, z) for z in (*ZEROS, QUARTER)}
            | {(ONE, z) for z in (*ZEROS, QUARTER, HALF)},
        ),
        ("best_worst", {(ONE, z) for z in ZEROS}),
    ],
)
def test_build_pairs_in_the_small_world(policy, expected):
    pairs = build_pairs([hop_1()], PairRule(policy))
    assert texts(pairs) == expected
    assert len(pairs) == {"adjacent": 5, "all": 12, "best_worst": 3}[policy]
    assert all(pair.margin == round(pair.chosen_reward - pair.rejected_reward, 9) > 0 for pair in pairs)
    assert {(pair.question_id, pair.hop) for pair in pairs} == {("q5", 1)}


@pytest.mark.parametrize(("policy", "count"), [("adjacent", 11), ("all", 23), ("best_worst", 4)])
def test_build_pairs_counts_the_cross_product_of_levels(policy, count):
    # levels of 2, 3, 1 and 2 queries: 2*3 + 3*1 + 1*2; besides 2*1 + 2*2 + 3*2; 2*2
    assert len(build_pairs([group(0, 0, 0.2, 0.2, 0.2, 0.5, 1, 1)], PairRule(policy))) == count


def test_build_pairs_gives_nothing_for_a_single_level():
    assert build_pairs([group(0.5, 0.5, 0.5), group(0.1, state=SearchState("z"))], PairRule("all")) == []


def test_build_pairs_reads_returns_and_not_rewards():
    swapped = Group((("g",),), (candidate(0.2, query="a", ret=0.9), candidate(0.7, query="b", ret=0.1, sample=1)))
    assert texts(build_pairs([swapped], PAPER)) == {("a", "b")}


def test_equal_texts_are_one_query_with_the_mean_return_and_all_their_prompts():
    same = Group(
        (("g",),),
        (
            candidate(0.5, query="w", prompt="a"),
            candidate(0.25, query=" w ", prompt="b"),
            candidate(0.0, query="v", prompt="c"),
        ),
    )
    assert [(q.text, q.value, q.prompts) for q in distinct_queries(same, PAPER)] == [
        ("v", 0.0, ("c",)),
        ("w", 0.375, ("a", "b")),
    ]
    (pair,) = build_pairs([same], PAPER)
    assert (pair.chosen_prompts, pair.rejected_prompts, pair.margin) == (("a", "b"), ("c",), 0.375)


def test_margin_is_inclusive_and_filters_after_levels_are_paired():
    levels = group(0, 0.25, 0.5, 1)
    assert [p.margin for p in build_pairs([levels], PairRule(margin=0.25))] == [0.25, 0.25, 0.5]
    assert [p.margin for p in build_pairs([levels], PairRule(margin=0.3))] == [0.5]
    assert len(build_pairs([levels], PairRule("all", margin=0.5))) == 4
    fractions = named(("a", 1 / 6), ("b", 1 / 4))
    assert len(build_pairs([fractions], PairRule(margin=1 / 12))) == 1


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [("A dam, in Rome", "rome: a DAM in", 1), ("a b c", "b c d", 0.5), ("a", "b", 0), ("", "", 1), ("", "a", 0)],
)
def test_jaccard(first, second, overlap):
    assert jaccard(first, second) == overlap


def test_near_duplicates_of_one_level_collapse_and_across_levels_make_no_pair():
    near = named(
        ("the dam of rome", 0.5),
        ("dam of rome the", 0.5),
        ("rome dam", 0.5),
        ("the dam of Rome!", 0.0),
        ("oslo", 0.0),
    )
    assert len(build_pairs([near], PAPER)) == 6
    rule = PairRule(near_duplicate=0.9)
    assert [q.text for q in distinct_queries(near, rule)] == ["oslo", "the dam of Rome!", "rome dam", "dam of rome the"]
    assert texts(build_pairs([near], rule)) == {
        ("rome dam", "oslo"),
        ("rome dam", "the dam of Rome!"),
        ("dam of rome the", "oslo"),
    }
    # 2 of 4 words in common: one of a level goes, the shorter stays
    assert texts(build_pairs([near], PairRule(near_duplicate=0.5))) == {("rome dam", "oslo")}


def test_echoes_and_empty_queries_are_left_out_of_pairs_and_targets():
    echoing = named(("Passages found so far: x", 1.0), ("good", 0.5), ("bad", 0.0), ("  ", 0.0))
    rule = PairRule(echo_headers=("passages found",))
    assert texts(build_pairs([echoing], rule)) == {("good", "bad")}
    assert [t.query for t in best_queries([echoing], rule)] == ["good"]
    alone = named(("Passages found so far: x", 1.0), ("bad", 0.0))
    assert build_pairs([alone], rule) == []
    assert best_queries([alone], rule) == []  # what is left has one level: no target either


def many_hops():
    """Question 'q' with 20, 20 and 2 adjacent pairs at its three hops, and 'z' with 4."""
    first = group(*[0] * 4, *[1] * 5)
    state = first.candidates[-1].state_after
    second = group(*[0] * 4, *[1] * 5, state=state)
    third = group(0, 0, 1, state=second.candidates[-1].state_after)
    return [first, second, third, group(0, 0, 1, 1, state=SearchState("z"))]


def test_max_pairs_is_a_limit_a_question_shared_out_over_its_hops():
    assert Counter(p.hop for p in build_pairs(many_hops(), PAPER) if p.question_id == "q") == {1: 20, 2: 20, 3: 2}
    pairs = build_pairs(many_hops(), PairRule(max_pairs=12))
    assert Counter((p.question_id, p.hop) for p in pairs) == {("q", 1): 5, ("q", 2): 5, ("q", 3): 2, ("z", 1): 4}
    assert Counter(p.hop for p in build_pairs(many_hops()[:3], PairRule(max_pairs=4))) == {1: 2, 2: 1, 3: 1}


def test_max_pairs_takes_the_same_ones_in_any_order_and_others_with_another_seed():
    rule, groups = PairRule(max_pairs=6), many_hops()
    first = build_pairs(groups, rule)
    for seed in range(5):
        shuffled = [Group(g.gold, tuple(random.Random(seed).sample(g.candidates, len(g.candidates)))) for g in groups]
        random.Random(seed).shuffle(shuffled)
        assert build_pairs(shuffled, rule) == first
    assert build_pairs(groups, replace(rule, seed=1)) != first
    # a pair's lot does not change with what else is there: the smaller limit takes from the larger one's pairs
    assert texts(build_pairs(groups[:1], PairRule(max_pairs=3))) < texts(build_pairs(groups[:1], rule))


def solved_group(stop=True):
    """The second hop after everything was found, with three searches and the stop action."""
    state = tried(ONE).state_after
    searches = [tried(q, state, prompt=p) for q, p in (("freda", "a"), ("oslo", "b"), ("dam", "c"))]
    stopping = candidate(1.0, query="", state=state, prompt="stop", hits=(), stopped=True)
    return Group(GOLD, (*searches, *([stopping] if stop else [])))


@pytest.mark.parametrize("stop", ["", "STOP"])
@pytest.mark.parametrize("explored", [True, False])
def test_stopping_is_preferred_to_any_search_where_everything_was_found(stop, explored):
    rule, solved = PairRule(stop_query=stop), solved_group(explored)
    expected = {(stop, "freda"), (stop, "oslo"), (stop, "dam")}
    assert texts(p for p in build_pairs([solved], rule) if p.rejected) == expected
    assert {p.chosen_reward for p in build_pairs([solved], rule)} == {1.0}
    (target,) = best_queries([solved], rule)
    assert (target.query, target.reward, target.hop) == (stop, 1.0, 2)


def test_solved_states_are_ordinary_without_a_stop_query():
    solved = solved_group()
    assert solved.all_found
    assert build_pairs([solved], PAPER) == []  # average precision stays 1 whatever is searched for
    assert best_queries([solved], PAPER) == []


def test_stopping_early_is_an_ordinary_query():
    rule = PairRule(stop_query="")
    stop = candidate(0.5, query="", sample=9, hits=(), stopped=True)
    early = Group((("g",),), (stop, candidate(0.75, query="search on"), candidate(0.25, query="worse", sample=1)))
    assert texts(build_pairs([early], rule)) == {("search on", ""), ("", "worse")}
    assert texts(build_pairs([early], PAPER)) == {("search on", "worse")}


def test_best_queries_breaks_ties_by_words_and_then_text():
    ties = named(("three words here", 1.0), ("two words", 1.0), ("oak trees", 1.0), ("bad", 0.0))
    assert [t.query for t in best_queries([ties], PAPER)] == ["oak trees"]
    flat = named(("two words", 0.5), ("one", 0.5))
    assert best_queries([flat], PAPER) == []


def test_best_queries_of_the_small_world_is_the_one_that_finds_both():
    assert [t.query for t in best_queries([hop_1()], PAPER)] == [ONE]


def test_best_queries_is_sorted_whatever_the_order_of_the_groups():
    groups = many_hops()
    targets = best_queries(groups[::-1], PAPER)
    assert [(t.question_id, t.hop) for t in targets] == [("q", 1), ("q", 2), ("q", 3), ("z", 1)]


def test_pair_is_the_same_after_json():
    pair = build_pairs([hop_1()], PAPER)[0]
    assert Pair.from_json(pair.to_json()) == pair


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"policy": "adjacents"}, "unknown pairs 'adjacents'; did you mean 'adjacent'"),
        ({"margin": -0.1}, "margin of a pair"),
        ({"max_pairs": -1}, "max_pairs must be at least 0"),
        ({"near_duplicate": 0.0}, "near_duplicate must be above 0"),
        ({"echo_headers": "Context"}, "echo_headers must be a list"),
        ({"echo_headers": ("Context", " ")}, "echo_headers must be a list"),
    ],
)
def test_pair_rule_refuses(fields, words):
    with pytest.raises(UsageError, match=words):
        PairRule(**fields)


def test_group_pairs_leaves_the_limit_to_build_pairs():
    assert len(group_pairs(many_hops()[0], PairRule(max_pairs=1))) == 20
