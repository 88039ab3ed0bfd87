import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from llmrl.errors import DataError, UsageError
from llmrl.leret.best_of import best_of_curve, expected_best
from llmrl.leret.context import SearchState
from llmrl.leret.evaluate import (
    METRICS,
    HopScore,
    Outcome,
    System,
    report_json,
    report_seeds,
    score_hops,
    score_state,
)
from llmrl.leret.questions import Excluded, Question

GOLD = (frozenset({"g1"}), frozenset({"g2", "g2b"}))


def system(name, recalls, types=None, hops=1):
    """A system whose questions q000, q001, ... have these recalls at the end; every metric is the recall."""
    types = types or [None] * len(recalls)
    return System(
        name, tuple(outcome(f"q{i:03}", [r] * hops, t) for i, (r, t) in enumerate(zip(recalls, types, strict=True)))
    )


def outcome(question, recalls, kind=None, no_hit=()):
    no_hit = no_hit or [False] * len(recalls)
    hops = tuple(HopScore(r, r, r, r, n) for r, n in zip(recalls, no_hit, strict=True))
    return Outcome(question, kind, hops, ("query",) * len(hops), ("p1",))


def difference(a, b, draws):
    return report_json([a, b], [(a.name, b.name)], draws=draws)["paired"][f"{a.name} - {b.name}"]


def halves(rng, count, p):
    """Recalls of questions with two gold documents, each found with probability p."""
    return (rng.binomial(2, p, count) / 2).tolist()


# --- scores of one question -------------------------------------------------------------------------------------------


def test_score_hops_by_hand():
    scores = score_hops([["x", "g1", "y"], ["x", "g1", "y", "z", "g2b"]], GOLD, [False, False])
    assert scores == (
        HopScore(recall=0.5, ap=(1 / 2) / 2, mrr=1 / 2, both=0.0),
        HopScore(recall=1.0, ap=(1 / 2 + 2 / 5) / 2, mrr=1 / 2, both=1.0),
    )


def test_score_hops_of_nothing_found():
    assert score_hops([[]], GOLD, [True]) == (HopScore(0.0, 0.0, 0.0, 0.0, no_hit=True),)
    with pytest.raises(DataError, match="one no_hit for each of 2 hops, got 1"):
        score_hops([[], []], GOLD, [True])


@pytest.mark.parametrize(("rule", "ap"), [("hop_order", (1 / 2 + 2 / 4) / 2), ("score", (1 + 2 / 3) / 2)])
def test_score_state_scores_the_merged_context_of_each_hop(rule, ap):
    question = Question("q", "who?", GOLD, type="bridge")
    state = SearchState("q", ("one", "two", "three"), (("x", "g1", "y"), ("g2",), ()), ((5.0, 4.0, 1.0), (9.0,), ()))
    found = score_state(question, state, rule)
    # by score: g2, x, g1, y
    assert [hop.ap for hop in found.hops] == pytest.approx([1 / 4, ap, ap])
    assert [hop.no_hit for hop in found.hops] == [False, False, True]
    assert (found.type, found.queries, set(found.context)) == (
        "bridge",
        ("one", "two", "three"),
        {"x", "g1", "y", "g2"},
    )
    assert Outcome.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_score_state_of_a_search_that_never_searched_scores_nothing():
    found = score_state(Question("q", "who?", GOLD), SearchState("q"), "hop_order")
    assert found.hops == ()
    assert found.after(2) == HopScore(0.0, 0.0, 0.0, 0.0)


def test_outcome_after_a_hop_that_was_not_made_is_the_last_one():
    found = outcome("q", [0.5, 1.0])
    assert [found.after(hop).recall for hop in (1, 2, 3)] == [0.5, 1.0, 1.0]


# --- means and intervals ----------------------------------------------------------------------------------------------


def test_report_json_means_by_hand():
    policy = System(
        "policy",
        (
            outcome("a", [0.5, 1.0], "bridge"),
            outcome("b", [0.5], "bridge"),  # stopped after one hop
            outcome("c", [0.0, 0.5], "comparison", no_hit=[True, False]),
            outcome("d", [1.0, 1.0], "bridge", no_hit=[False, True]),
        ),
    )
    found = report_json([policy], [], draws=100)["systems"]["policy"]
    assert found["recall"]["value"] == pytest.approx(3 / 4)
    assert [hop["recall"]["value"] for hop in found["by_hop"]] == pytest.approx([2 / 4, 3 / 4])
    assert [hop["searches"] for hop in found["by_hop"]] == [4, 3]
    assert [hop["empty"] for hop in found["by_hop"]] == pytest.approx([1 / 4, 1 / 3])
    assert (found["searches"], found["empty"]) == (7, pytest.approx(2 / 7))
    assert found["hops_used"]["value"] == pytest.approx(7 / 4)
    assert found["by_type"]["bridge"]["recall"]["value"] == pytest.approx(2.5 / 3)
    assert found["by_type"]["bridge"]["questions"] == 3
    # one question says nothing about the next
    assert found["by_type"]["comparison"]["recall"] == {"value": 0.5, "low": None, "high": None}


def test_report_json_interval_is_that_of_the_normal_theory():
    values = halves(np.random.default_rng(0), 400, 0.6)
    score = report_json([system("a", values)], [], draws=10_000)["systems"]["a"]["recall"]
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert score["low"] == pytest.approx(np.mean(values) - half, abs=0.002)
    assert score["high"] == pytest.approx(np.mean(values) + half, abs=0.002)


def test_report_json_difference_is_that_of_the_paired_normal_theory():
    rng = np.random.default_rng(1)
    a, b = halves(rng, 400, 0.6), halves(rng, 400, 0.5)
    found = report_json([system("a", a), system("b", b)], [("a", "b")], draws=10_000)["paired"]["a - b"]["ap"]
    difference = np.subtract(a, b)
    mean, error = difference.mean(), difference.std() / 20
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=0.003)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=0.003)
    assert found["two_sided"] == pytest.approx(math.erfc(mean / error / math.sqrt(2)), abs=0.003)


def test_report_json_intervals_cover_the_truth():
    """Of 200 samples of 80 questions, about 95% of the intervals hold the true mean and the true difference."""
    hits = {"mean": 0, "difference": 0}
    for repetition in range(200):
        rng = np.random.default_rng(repetition)
        hard = rng.choice([-0.25, 0.25], 80)  # what both systems share
        a, b = (system(name, (rng.binomial(2, p + hard) / 2).tolist()) for name, p in (("a", 0.6), ("b", 0.5)))
        report = report_json([a, b], [("a", "b")], draws=400, seed=repetition)
        mean, difference = report["systems"]["a"]["recall"], report["paired"]["a - b"]["recall"]
        hits["mean"] += mean["low"] <= 0.6 <= mean["high"]
        hits["difference"] += difference["low"] <= 0.1 <= difference["high"]
    # binomial(200, 0.95) is within these in 999 of 1000 cases, give or take a percent of the percentile method
    assert all(177 <= count <= 199 for count in hits.values()), hits


def test_paired_difference_is_tighter_than_that_of_separate_questions():
    rng = np.random.default_rng(2)
    hard = rng.choice([-0.4, 0.4], 200)
    a, b = ((rng.binomial(2, p + hard) / 2).tolist() for p in (0.55, 0.5))
    pair = [("a", "b")]
    paired = report_json([system("a", a), system("b", b)], pair, draws=4000)["paired"]["a - b"]["recall"]
    loose = report_json([system("a", a), system("b", rng.permutation(b).tolist())], pair, draws=4000)["paired"][
        "a - b"
    ]["recall"]
    assert paired["value"] == loose["value"]
    assert paired["high"] - paired["low"] < 0.8 * (loose["high"] - loose["low"])


def test_report_json_does_not_depend_on_the_order_of_questions_systems_and_pairs():
    rng = np.random.default_rng(3)
    types = [("bridge", "comparison")[i % 2] for i in range(30)]
    a, b = (system(name, halves(rng, 30, 0.5), types, hops=2) for name in "ab")
    report = report_json([a, b], [("a", "b"), ("b", "a")], draws=300)
    mixed = [replace(s, outcomes=tuple(s.outcomes[i] for i in rng.permutation(30))) for s in (b, a)]
    assert report_json(mixed, [("b", "a"), ("a", "b")], draws=300) == report
    assert report_json([a], [], draws=300)["systems"]["a"] == report["systems"]["a"]
    assert report_json([a, b], [("a", "b")], draws=300, seed=1)["paired"] != report["paired"]
    back, forth = report["paired"]["a - b"]["recall"], report["paired"]["b - a"]["recall"]
    assert (back["value"], back["two_sided"]) == (-forth["value"], forth["two_sided"])
    assert back["low"] == pytest.approx(-forth["high"], abs=1e-12)


def test_two_sided_of_equal_systems_is_one_and_of_different_ones_never_zero():
    a = system("a", [0.5, 1.0, 0.0, 0.5] * 5)
    same = difference(a, replace(a, name="b"), 500)["recall"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "two_sided": 1.0}
    worse = difference(system("a", [1.0] * 20), system("b", [0.0] * 20), 999)["recall"]
    assert worse == {"value": 1.0, "low": 1.0, "high": 1.0, "two_sided": pytest.approx(2 / 1000)}


# --- several seeds ----------------------------------------------------------------------------------------------------


def seeds_of(values, name="policy"):
    return {str(i): [system(name, row), system("question", [0.5] * len(row))] for i, row in enumerate(values)}


def test_report_seeds_by_hand():
    report = report_seeds(seeds_of([[1.0, 0.0, 1.0, 1.0], [0.5, 0.5, 1.0, 0.0]]), [("policy", "question")], draws=200)
    score, difference = report["systems"]["policy"]["recall"], report["paired"]["policy - question"]["recall"]
    assert score["value"] == pytest.approx(0.625)
    assert score["runs"] == {"0": 0.75, "1": 0.5}
    assert score["sd"] == pytest.approx(math.sqrt(2 * 0.125**2))
    assert difference["value"] == pytest.approx(0.125)
    assert difference["runs"] == {"0": 0.25, "1": 0.0}
    assert report["bootstrap"]["training_seeds"] == ["0", "1"]
    assert report["systems"]["question"]["recall"]["sd"] == 0.0
    assert report["systems"]["policy"]["searches"] == 8


def test_report_seeds_draws_the_runs_of_a_question_together():
    """Three runs that agree are as good as one; independent ones as three times the questions."""
    rng = np.random.default_rng(4)
    one = halves(rng, 120, 0.5)
    pairs, width = [("policy", "question")], {}
    for name, values in {
        "one": [one],
        "three alike": [one] * 3,
        "three apart": [halves(rng, 120, 0.5) for _ in range(3)],
    }.items():
        found = report_seeds(seeds_of(values), pairs, draws=4000)["paired"]["policy - question"]["recall"]
        width[name] = found["high"] - found["low"]
    assert width["three alike"] == pytest.approx(width["one"], rel=1e-9)
    assert width["three apart"] == pytest.approx(width["one"] / math.sqrt(3), rel=0.15)


def test_report_seeds_averages_the_seeds_before_it_draws():
    rng = np.random.default_rng(5)
    values = [halves(rng, 50, 0.5) for _ in range(3)]
    pooled = report_seeds(seeds_of(values), [("policy", "question")], draws=500)["paired"]["policy - question"]["ap"]
    mean = system("mean", np.mean(values, axis=0).tolist())
    single = difference(mean, system("question", [0.5] * 50), 500)["ap"]
    assert {key: pooled[key] for key in single} == {key: pytest.approx(value) for key, value in single.items()}


def test_report_seeds_of_equal_values_have_no_spread():
    """A mean of .7 three times has a deviation of 1e-16, which was shown as ±.000."""
    report = report_seeds(seeds_of([[0.7] * 3] * 3), [("policy", "question")], draws=20)
    assert report["systems"]["policy"]["recall"]["sd"] == 0.0
    assert report["paired"]["policy - question"]["ap"]["sd"] == 0.0


def test_a_row_that_mostly_found_nothing_is_marked():
    half = [False, True]
    outcomes = [outcome("a", [1.0, 1.0], no_hit=half), outcome("b", [0.0, 0.0], no_hit=half)]
    never = Outcome("c", None, (), (), ())  # no query was written
    even = report_json([System("policy", tuple(outcomes))], [], draws=10)["systems"]["policy"]
    assert (even["empty"], even["never_searched"], even["mostly_empty"]) == (0.5, 0, False)
    most = report_json([System("policy", (*outcomes, never))], [], draws=10)["systems"]["policy"]
    assert (most["searches"], most["empty"], most["never_searched"], most["mostly_empty"]) == (4, 0.5, 1, True)


def test_report_seeds_with_other_systems_are_refused():
    runs = seeds_of([[1.0, 0.0], [0.5, 0.5]])
    runs["1"] = runs["1"][:1]
    with pytest.raises(DataError, match="seed 1: expected each of policy, question once, got policy"):
        report_seeds(runs, [])


# --- the format -------------------------------------------------------------------------------------------------------


def test_report_json_has_the_format_that_programs_read():
    rng = np.random.default_rng(6)
    types = ["bridge"] * 8 + ["comparison"] * 4
    systems = [system(name, halves(rng, 12, 0.5), types, hops=2) for name in ("question", "policy")]
    excluded = [Excluded("x", "gold document not in the corpus", "Title"), Excluded("y", "no gold document named", "")]
    facts = {"corpus": "0123456789abcdef", "hops": 2, "k": 3}
    report = report_json(systems, [("policy", "question")], draws=200, excluded=excluded, facts=facts)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert list(report["systems"]) == ["question", "policy"]
    for found in report["systems"].values():
        scored = [found, *found["by_hop"], *found["by_type"].values()]
        assert [hop["hop"] for hop in found["by_hop"]] == [1, 2]
        assert set(found["by_type"]) == {"bridge", "comparison"}
        assert found["empty"] == 0.0
        for scores in scored:
            for metric in ("recall", "ap", "both", "mrr"):
                assert set(scores[metric]) == {"value", "low", "high"}
                assert 0 <= scores[metric]["low"] <= scores[metric]["value"] <= scores[metric]["high"] <= 1
    differences = report["paired"]["policy - question"]
    assert set(differences) == set(METRICS)
    for score in differences.values():
        assert score["low"] <= score["value"] <= score["high"]
    assert len(report["paired_by_hop"]["policy - question"]) == 2
    assert set(report["paired_by_type"]["policy - question"]) == {"bridge", "comparison"}
    assert report["questions"] == 12
    reasons = {"gold document not in the corpus": 1, "no gold document named": 1}
    assert report["excluded"] == {"questions": 2, "reasons": reasons, "ids": ["x", "y"]}
    assert {key: report[key] for key in facts} == facts


def test_report_json_of_questions_without_a_type_has_no_types():
    assert report_json([system("a", [1.0, 0.0])], [], draws=10)["systems"]["a"]["by_type"] == {}
    some = report_json([system("a", [1.0, 0.0], ["bridge", None])], [], draws=10)["systems"]["a"]["by_type"]
    assert set(some) == {"bridge", "no type"}


def test_report_json_by_hop_has_the_hops_of_the_system():
    top, policy = system("question-top", [1.0, 0.0]), system("policy", [1.0, 0.5], hops=2)
    report = report_json([top, policy], [("policy", "question-top")], draws=10)
    assert [len(found["by_hop"]) for found in report["systems"].values()] == [1, 2]
    assert len(report["paired_by_hop"]["policy - question-top"]) == 1


# --- bad input --------------------------------------------------------------------------------------------------------


def test_report_json_of_different_questions_is_refused():
    a, b = system("a", [1.0, 0.5, 0.0]), system("b", [1.0, 0.5])
    with pytest.raises(DataError, match=r"'a' and 'b' were not asked the same questions: 1 only .* 0 only .* q002"):
        report_json([a, b], [("a", "b")])
    other = replace(b, outcomes=tuple(replace(o, question_id=f"z{o.question_id}") for o in b.outcomes))
    with pytest.raises(DataError, match="2 only of the first, 2 only of the second"):
        report_json([b, replace(other, name="c")], [])


def test_report_json_of_different_types_is_refused():
    a, b = system("a", [1.0], ["bridge"]), system("b", [1.0], ["comparison"])
    with pytest.raises(DataError, match="q000 is of type bridge in 'a' and comparison in 'b'"):
        report_json([a, b], [])


def test_system_needs_one_outcome_a_question():
    with pytest.raises(DataError, match="'a' has no outcomes"):
        System("a", ())
    with pytest.raises(DataError, match="'a' has 2 outcomes of question q"):
        System("a", (outcome("q", [1.0]), outcome("q", [0.0]), outcome("r", [0.0])))
    with pytest.raises(DataError, match=r"Outcome.queries: expected 1, one a hop"):
        Outcome("q", None, (HopScore(0, 0, 0, 0),), (), ())


def test_report_json_needs_systems_of_different_names():
    with pytest.raises(DataError, match="at least one system"):
        report_json([], [])
    with pytest.raises(DataError, match="expected each of a once, got a, a"):
        report_json([system("a", [1.0]), system("a", [0.5])], [])


def test_report_json_of_an_unknown_pair_or_a_clashing_fact_is_refused():
    with pytest.raises(UsageError, match="no system 'polcy' to compare; did you mean 'policy'"):
        report_json([system("policy", [1.0])], [("polcy", "policy")])
    with pytest.raises(UsageError, match="'questions' is a key of the report"):
        report_json([system("policy", [1.0])], [], draws=10, facts={"questions": 3})


# --- queries sampled --------------------------------------------------------------------------------------------------


def test_expected_best_is_the_mean_over_all_subsets():
    values = [0.5, 0.0, 1.0, 0.5, 0.25, 0.0]
    by_hand = [np.mean([max(subset) for subset in combinations(values, n)]) for n in range(1, 7)]
    assert expected_best(values) == pytest.approx(by_hand, abs=1e-12)


def test_expected_best_of_many_values_stays_finite():
    found = expected_best([i / 1500 for i in range(1501)])
    assert found[0] == pytest.approx(0.5)
    assert found[1] == pytest.approx(1502 * 2 / 3 / 1500 - 1 / 1500)  # (m + 1) n / (n + 1) of the numbers 1 to m
    assert found[-1] == 1.0


def test_best_of_curve_averages_states_then_questions():
    groups = [("a", [0.0, 1.0]), ("b", [0.5]), ("a", [1.0, 1.0]), ("c", [])]
    curve = best_of_curve(groups, draws=100)
    assert [point["n"] for point in curve] == [1, 2]
    # a: (0.5 + 1) / 2 and 1; b has one query, which is also the best of two
    assert [point["value"] for point in curve] == pytest.approx([(0.75 + 0.5) / 2, (1 + 0.5) / 2])
    assert (curve[0]["low"], curve[0]["high"]) == (0.5, 0.75)
    assert best_of_curve(groups[::-1], draws=100) == curve


def test_best_of_curve_without_queries_is_refused():
    with pytest.raises(DataError, match="no query was tried"):
        best_of_curve([("a", [])])
