"""Whole searches: the question on every hop, all at once, rules, an oracle over rules, and a model."""

import pytest
from explore_world import BARE, CORPUS, QUESTIONS, ChainRetriever, engine, explorer, prompt_text, say, style
from small_world import DAMS, PEOPLE

from llmrl.errors import RequestError
from llmrl.leret.context import SearchState
from llmrl.leret.evaluate import report_json
from llmrl.leret.explore import ExploreSettings
from llmrl.leret.play import baselines, play, rule_systems
from llmrl.leret.rewards import reward_named
from llmrl.leret.search import Searcher

SETTINGS = ExploreSettings(hops=2, merge="hop_order", reward=reward_named("ap"))
ASKED = QUESTIONS[5:]


def outcome(system, question="q5"):
    return next(found for found in system.outcomes if found.question_id == question)


def test_question_asks_on_every_hop_and_question_top_asks_once_for_as_many(tmp_path):
    systems = baselines(ChainRetriever(), CORPUS, ASKED, SETTINGS, k=3, unseen_only=False)
    every, top = map(outcome, systems)
    assert [system.name for system in systems] == ["question", "question-top"]
    assert every.queries == (ASKED[0].text,) * 2
    assert every.context == ("d5", "d0", "p0")
    assert top.queries == (ASKED[0].text,)
    assert top.context == ("d5", "d0", "p0", "d1", "p1", "d2")
    assert (every.hops[-1].recall, every.hops[-1].ap) == (0.5, 0.5)


def test_with_unseen_passages_only_the_question_finds_on_every_hop_what_its_top_holds():
    every, top = baselines(ChainRetriever(), CORPUS, ASKED, SETTINGS, k=3, unseen_only=True)
    assert [found.context for found in every.outcomes] == [found.context for found in top.outcomes]


def test_a_rule_begins_with_the_question_and_the_oracle_takes_the_best_rule_of_each_question():
    rules = {
        "odd": lambda q, p: f"{PEOPLE[DAMS.index(q.split()[-3])]} born" if DAMS.index(q.split()[-3]) % 2 else "zzz",
        "even": lambda q, p: "zzz" if DAMS.index(q.split()[-3]) % 2 else f"{PEOPLE[DAMS.index(q.split()[-3])]} born",
    }
    odd, even, oracle = rule_systems(rules, Searcher(ChainRetriever(), 3), CORPUS, ASKED, SETTINGS)
    assert (odd.name, even.name, oracle.name) == ("rule:odd", "rule:even", "oracle-rule")
    assert outcome(odd).queries == (ASKED[0].text, "freda born")
    assert outcome(odd).hops[-1].recall == 1
    assert outcome(even).hops[-1].recall == 0.5
    assert oracle.means()["recall"] == 1
    assert odd.means()["recall"] == pytest.approx((3 + 2 / 2) / 5)


def test_a_model_plays_in_one_style_greedily_and_is_not_asked_twice(tmp_path):
    made = explorer(samples=3, temperatures=(0.7,))
    system = play("policy", made, ASKED, BARE, tmp_path)
    assert made.asker.tally.answers == 10
    assert outcome(system).queries == ("foxglove dam", "freda born")
    assert outcome(system).context == ("d5", "d0", "d1", "p5", "p0", "p1")
    assert system.means()["both"] == 1

    def never(request):
        raise AssertionError("asked again")

    assert play("policy", explorer(engine(never)), ASKED[::-1], BARE, tmp_path) == system


def test_an_empty_query_or_a_prompt_without_an_answer_ends_a_search_with_what_it_has(tmp_path):
    def some(request):
        text = prompt_text(request)
        if "[1]" in text and "hazel" in text.split("[1]")[0]:
            raise RequestError("too long")
        return "" if "[1]" in text and "iris" in text.split("[1]")[0] else say(request)

    made = explorer(engine(some))
    system = play("policy", made, ASKED, BARE, tmp_path)
    assert [len(found.hops) for found in system.outcomes] == [2, 2, 1, 1, 2]
    assert outcome(system, "q7").hops[-1].recall == 0.5
    assert made.asker.tally.failed == 1
    assert report_json([system], [])["systems"]["policy"]["hops_used"]["value"] == 1.6


def test_following_samples_each_state_by_seeds_that_do_not_depend_on_the_others(tmp_path):
    by_id = {question.id: question for question in ASKED}
    made = explorer()
    drawn = {}
    for folder, ids in (("all", ["q5", "q6", "q7"]), ("one", ["q7"])):
        ends = made.follow(
            [SearchState(name) for name in ids], by_id, style("seed"), tmp_path / folder, samples=4, temperature=1.0
        )
        drawn[folder] = ends[-1]
    assert drawn["all"] == drawn["one"]
    assert len({state.queries for state in drawn["one"]}) > 1
    assert made.follow([], by_id, BARE, tmp_path / "none") == []


def test_following_searches_with_the_question_first_where_the_run_does(tmp_path):
    made = explorer(question_first=True)
    system = play("policy", made, ASKED, BARE, tmp_path)
    assert outcome(system).queries == (ASKED[0].text, "freda born")
    assert made.asker.tally.answers == 5
