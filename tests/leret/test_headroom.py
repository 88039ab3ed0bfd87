import json
import re
from itertools import count

import pytest
from small_world import QUESTION, candidate, hop_1, tried

from llmrl.leret import headroom as module
from llmrl.leret.context import SearchState
from llmrl.leret.headroom import headroom, headroom_table, refuse_reason
from llmrl.leret.pairs import PairRule
from llmrl.leret.records import Group

RULE = PairRule()


@pytest.fixture
def two_hops():
    """Hop 1 of the small world with six prompts, hop 2 from the question's own context with two of them at two temperatures.

    Hop 2: "freda" finds p5 (3/4); "zzz" finds nothing and keeps 1/2.
    """
    state = tried(QUESTION).state_after
    later = [
        tried("freda", state, prompt="bare"),
        tried("zzz", state, prompt="bare", temperature=0.5),
        tried("zzz", state, prompt="p1"),
        tried("freda", state, prompt="p1", temperature=0.5, sample=1),
    ]
    return [hop_1(), Group(hop_1().gold, tuple(later))]


def test_headroom_of_the_small_world(two_hops):
    report = headroom(two_hops, RULE)
    assert (report["questions"], report["groups"], report["searches"]) == (1, 2, 10)
    assert report["empty_retrievals"] == 0.3
    assert report["distinct_queries"] == pytest.approx((5 / 5 + 1 / 3) / 2)
    assert report["levels"] == {"mean": 3.0, "histogram": {"2": 1, "4": 1}}
    assert (report["pairs"], report["pairs_by_hop"], report["questions_with_pair"]) == (6, {"1": 5, "2": 1}, 1.0)
    # hop 1: best 1, mean (1/2 + 1/4 + 1) / 6, bare 1/2; hop 2: best 3/4, mean and bare 5/8
    mean = (1.75 / 6 + 5 / 8) / 2
    assert report["best"] == 0.875
    assert report["mean"] == pytest.approx(mean)
    assert report["bare"] == pytest.approx((1 / 2 + 5 / 8) / 2)
    assert report["headroom"] == pytest.approx(0.875 - mean)
    assert report["headroom_bare"] == pytest.approx(0.875 - (1 / 2 + 5 / 8) / 2)
    assert report["room_by_hop"]["2"] == {
        "best": 0.75, "mean": 0.625, "bare": 0.625, "headroom": 0.125, "headroom_bare": 0.125
    }  # fmt: skip
    assert refuse_reason(report) is None


def test_headroom_win_rates_count_ties_and_lone_winners(two_hops):
    wins = headroom(two_hops, RULE)["win_rates"]
    assert wins["p5"] == {"groups": 1, "best": 1.0, "alone": 1.0}
    assert wins["bare"] == wins["p1"] == {"groups": 2, "best": 0.5, "alone": 0.0}  # both reach 3/4 at hop 2
    assert wins["p2"] == {"groups": 1, "best": 0.0, "alone": 0.0}


def test_headroom_reports_each_axis(two_hops):
    axes = headroom(two_hops, RULE)["axes"]
    assert axes["temperature"] == {
        "0": {"tried": 8, "reward": pytest.approx((1.75 + 0.75 + 0.5) / 8), "empty_retrievals": 0.25},
        "0.5": {"tried": 2, "reward": 0.625, "empty_retrievals": 0.5},
    }
    assert axes["sample"]["1"] == {"tried": 1, "reward": 0.75, "empty_retrievals": 0.0}
    assert axes["prompt"]["bare"]["tried"] == 3
    assert axes["prompt"]["bare"]["reward"] == pytest.approx((0.5 + 0.75 + 0.5) / 3)


def test_headroom_is_json_and_the_table_shows_it(two_hops):
    report = headroom(two_hops, RULE)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    table = headroom_table(report)
    squeezed = " ".join(table.split())
    assert "| best / mean / bare prompt | 0.875 / 0.458 / 0.562 |" in squeezed
    assert "| pairs | 6 (by hop: 1: 5, 2: 1) |" in squeezed
    assert "| bare | 0.500 | 0.000 | 0.583 |" in squeezed
    lines = [line for line in table.splitlines() if line]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert headroom_table(headroom([], RULE))


def test_headroom_counts_a_stop_as_a_query_where_something_is_left_to_find(two_hops):
    first, second = two_hops
    stop = candidate(0.5, query="", state=second.state, prompt="p6", hits=(), stopped=True)
    report = headroom([first, Group(second.gold, (*second.candidates, stop))], RULE)
    assert (report["searches"], report["stops"], report["empty_retrievals"]) == (10, 1, 0.3)
    assert report["room_by_hop"]["2"]["mean"] == pytest.approx((4 * 0.625 + 0.5) / 5)
    assert report["win_rates"]["p6"] == {"groups": 1, "best": 0.0, "alone": 0.0}


def test_headroom_leaves_the_stop_action_of_a_solved_state_out():
    state = tried("foxglove freda born").state_after
    stop = candidate(1.0, query="", state=state, prompt="stop", hits=(), stopped=True)
    solved = Group(hop_1().gold, (tried("oslo", state), tried("zzz", state, prompt="p1"), stop))
    report = headroom([solved], PairRule(stop_query=""))
    assert (report["searches"], report["stops"], report["pairs"]) == (2, 0, 2)
    assert set(report["win_rates"]) == {"bare", "p1"}


number = count()


def question(*values, **fields):
    """A question of its own with these returns."""
    state = SearchState(f"q{next(number)}")
    return Group((("g",),), tuple(candidate(v, state=state, sample=i, **fields) for i, v in enumerate(values)))


def alike(*values):
    """The same query every time."""
    return question(*values, query="the same")


def empty(*values):
    return question(*values, hits=())


ENOUGH = [(0.0, 1.0)] * 3


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "nothing was explored"),
        ([empty(0, 0)] * 2 + [question(0, 1)], "67% of 6 searches found nothing .limit 50%."),
        ([question(0), question(1)], "one query a state, so nothing can be compared"),
        ([alike(0.5, 0.5, 0.5)], "the prompts ask the same query: 0.0% of what could differ does .least 5%."),
        ([question(0.5, 0.5), question(0, 0)], "0 pairs from 0.0% of 2 questions .least 2%."),
        ([question(0.5, 0.5) for _ in range(99)] + [question(0, 1)], "1 pairs from 1.0% of 100 questions"),
        ([question(0.5, 0.504), question(0.1, 0.104)], "earns 0.0020 more than the mean .least 0.005."),
    ],
)
def test_refuse_reason_says_why_there_is_nothing_to_learn(groups, words):
    assert re.search(words, refuse_reason(headroom(groups, RULE)))


def test_refuse_reason_lets_through_what_is_just_enough(monkeypatch):
    groups = [question(0.5, 0.5) for _ in range(49)] + [question(0, 1)]
    report = headroom(groups, RULE)
    assert (report["questions_with_pair"], report["headroom"]) == (0.02, 0.01)
    assert refuse_reason(report) is None
    monkeypatch.setattr(module, "MIN_HEADROOM", 0.011)
    assert "earns 0.0100 more than the mean" in refuse_reason(report)
    half_empty = [question(0, 1), empty(0, 0.1)]
    assert refuse_reason(headroom(half_empty, RULE)) is None
