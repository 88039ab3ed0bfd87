"""Rounds of regeneration in the charity talk: what is made is what the environment says, and what cannot be made is counted."""

import json
import time
from collections import Counter
from dataclasses import replace

import pytest

from llmrl.errors import DataError, EngineError, RequestError
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import charity
from llmrl.hindsight.envs.charity import Charity
from llmrl.hindsight.envs.common import play
from llmrl.hindsight.regeneration.budget import Meter
from llmrl.hindsight.regeneration.controllers import Proposal, RandomEdits, Scripted, ScriptedForesight
from llmrl.hindsight.regeneration.edits import BadAnswer, Edit
from llmrl.hindsight.regeneration.forward import Replay
from llmrl.hindsight.regeneration.rewards import RuleReward
from llmrl.hindsight.regeneration.rounds import Parts, Settings, open_turns, regenerate, root_of
from llmrl.types import Message

LOGS = charity.logs(60, 0)
BY_ID = {one.id: one for one in LOGS}
SCRIPTED = Scripted(charity)
ASK, REQUEST = "Tell me what you prefer.", "Please make a donation now."


def parts(controller=None, forward=None, logs=LOGS):
    """Return the scripted parts, or some in their place."""
    return Parts(controller or SCRIPTED, forward or Replay(charity, Charity), RuleReward(logs, exact=True))


def by_hand(one):
    """Play the agent's turns of a dialogue in its environment."""
    said = iter([one.messages[i].content for i in one.agent_turns])
    world = Charity(one.provenance["row"], one.provenance["seed"])
    return play(world, lambda history: next(said), id="by-hand", task="charity")


class Says:
    """A controller that is a function of the task, the attempt and the complaint."""

    name = "says"

    def __init__(self, say):
        self.say, self.asked = say, []

    def propose(self, task, attempt=0, complaint=None):
        self.asked.append((task.dialogue.id, attempt, complaint))
        said = self.say(task, attempt)
        if isinstance(said, Exception):
            raise said
        return Proposal(said, seed=17, prompt="asked")


def always(*edits):
    """Return a controller that makes these edits, of (turn, text)."""
    return Says(lambda task, attempt: [Edit(turn, "so", text) for turn, text in edits])


def outcomes(controller, logs=LOGS[:10], forward=None, **settings):
    (found,) = regenerate(logs, parts(controller, forward), Settings(**{"retries": 2, "seed": 5, **settings}))
    return found


ROUNDS = regenerate(LOGS, parts(), Settings(rounds=3, edits=2, candidates=2, seed=1))
MADE = {one.id: one for found in ROUNDS for one in found.made}


def test_regenerate_makes_what_the_environment_says():
    assert [len(found.made) > 30 for found in ROUNDS] == [True] * 3
    for one in MADE.values():
        again = by_hand(one)
        assert one.messages == again.messages
        assert one.rewards == pytest.approx(again.rewards)
        assert (one.done, one.truncated, one.task) == (True, False, "charity")
        assert one.total == pytest.approx(sum(again.rewards))


def test_regenerate_keeps_the_prefix_of_the_parent():
    before = dict(BY_ID)
    for number, found in enumerate(ROUNDS, 1):
        for one in found.made:
            told = one.provenance["regenerated"]
            parent, turn = before[told["parent"]], told["turn"]
            assert one.messages[:turn] == parent.messages[:turn]
            assert one.messages[turn].content != parent.messages[turn].content == told["said"]
            assert one.rewards[:turn] == pytest.approx(parent.rewards[:turn])
            assert told["parent_return"] == pytest.approx(parent.total)
            assert told["round"] == number
            assert root_of(one) == told["source"] == root_of(parent)
            assert one.provenance["seed"] == BY_ID[root_of(one)].provenance["seed"]
        before = {one.id: one for one in found.made}


def test_regenerate_edits_never_before_the_last_edit():
    again = 0
    for one in MADE.values():
        told = one.provenance["regenerated"]
        parent = MADE.get(told["parent"])
        assert all(turn >= told["turn"] for turn in open_turns(one))
        assert open_turns(one) == tuple(i for i in one.agent_turns if i >= told["turn"])
        if parent is not None:
            assert told["turn"] >= parent.provenance["regenerated"]["turn"]
            again += told["turn"] > parent.provenance["regenerated"]["turn"]
    assert again > 10
    assert open_turns(LOGS[0]) == LOGS[0].agent_turns


def test_regenerate_tells_where_every_new_turn_comes_from():
    for one in MADE.values():
        turns = one.provenance["regenerated"]["turns"]
        ancestors, at = [one], one
        while (at := MADE.get(at.provenance["regenerated"]["parent"])) is not None:
            ancestors.append(at)
        first = min(a.provenance["regenerated"]["turn"] for a in ancestors)
        assert [told["turn"] for told in turns] == list(range(first, len(one.messages)))
        assert one.messages[:first] == BY_ID[root_of(one)].messages[:first]
        edited = {a.provenance["regenerated"]["turn"]: a.provenance["regenerated"]["round"] for a in ancestors[::-1]}
        last = one.provenance["regenerated"]["turn"]
        for told in turns:
            assert set(told) == {"turn", "by", "model", "prompt", "seed", "round"}
            made_by = "agent" if one.messages[told["turn"]].role == "assistant" else "user"
            assert told["by"] == ("controller" if told["turn"] in edited else made_by)
            assert (told["model"], told["prompt"]) == ("scripted", None)
            assert isinstance(told["seed"], int)
            # what an earlier round made and no later one took back
            rounds = [number for turn, number in edited.items() if turn <= told["turn"]]
            assert told["round"] == max(rounds)
            assert told["round"] == len(ancestors) or told["turn"] < last
        assert Dialogue.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one


def test_regenerate_gives_every_dialogue_a_name_and_makes_none_twice():
    texts = [(root_of(one), one.messages) for one in [*LOGS, *MADE.values()]]
    assert sum(len(found.made) for found in ROUNDS) == len(MADE)
    assert len(set(texts)) == len(texts)


def test_regenerate_reaches_what_no_log_has():
    gains = [
        sum(one.total - one.provenance["regenerated"]["parent_return"] for one in found.made) / len(found.made)
        for found in ROUNDS
    ]
    # the first edit leaves the talk to the agent of the logs, which makes no use of it
    assert min(gains[1:]) > 0.3
    assert max(one.total for one in LOGS) < 1
    assert max(one.total for one in MADE.values()) == pytest.approx(1.85)  # no question asked, a lucky guess


@pytest.mark.parametrize("controller", [SCRIPTED, ScriptedForesight(charity), RandomEdits(LOGS)], ids=lambda c: c.name)
def test_regenerate_is_the_same_again_however_many_are_under_way(controller):
    settings = Settings(rounds=2, edits=1, candidates=2, seed=3)
    first, again = (
        [[one.to_json() for one in found.made] for found in regenerate(LOGS[:30], parts(controller), how)]
        for how in (settings, replace(settings, concurrency=1))
    )
    assert first == again
    assert all(first)
    other = regenerate(LOGS[:30], parts(controller), replace(settings, seed=4))
    assert [[one.to_json() for one in found.made] for found in other] != first


def test_regenerate_does_not_depend_on_the_other_dialogues():
    settings = Settings(rounds=2, seed=3)
    whole = {one.id: one for found in regenerate(LOGS, parts(), settings) for one in found.made}
    part = [one for found in regenerate(LOGS[10:40][::-1], parts(), settings) for one in found.made]
    assert part
    assert all(whole[one.id] == one for one in part)


def test_regenerate_tells_of_progress_and_of_nothing_to_do():
    with pytest.raises(DataError, match="no dialogue"):
        regenerate([], parts(), Settings())
    seen = []
    regenerate(LOGS[:7], parts(), Settings(rounds=2), lambda *told: seen.append(told))
    assert seen[:7] == [(1, i + 1, 7) for i in range(7)]
    assert {number for number, _, _ in seen} == {1, 2}


def test_random_edits_with_counts_makes_as_many():
    for logs, counts in ((LOGS, (30, 41, 7)), (LOGS[:20], (50,)), (LOGS, (1,))):
        settings = Settings(rounds=len(counts), counts=counts, seed=2)
        rounds = regenerate(logs, parts(RandomEdits(LOGS)), settings)
        assert tuple(len(found.made) for found in rounds) == counts
        assert len({one.id for found in rounds for one in found.made}) == sum(counts)
    said = {d.messages[i].content for d in LOGS for i in d.agent_turns}
    for one in rounds[0].made:
        assert one.messages[one.provenance["regenerated"]["turn"]].content in said


# --- controllers that answer badly


def test_bad_answers_are_asked_for_again_and_kept():
    controller = Says(lambda task, attempt: BadAnswer("prose", f"no JSON {attempt}", "Well, I think."))
    found = outcomes(controller)
    assert found.reasons() == {"prose": 30}
    assert not found.made
    for dialogue, outcome in found.jobs:
        assert outcome.attempts == 3
        assert [(attempt, one.answer) for attempt, one in outcome.refused] == [(i, "Well, I think.") for i in range(3)]
        asked = [told[1:] for told in controller.asked if told[0] == dialogue.id]
        assert asked == [(0, None), (1, "no JSON 0"), (2, "no JSON 1")]


@pytest.mark.parametrize(
    ("turn", "text", "reason"),
    [
        (1, "  ", "empty text"),
        (0, ASK, "not the agent's turn"),
        (99, ASK, "turn out of range"),
        (-1, ASK, "turn out of range"),
        (1, "very " * 40, "repetition"),
    ],
)
def test_edits_that_cannot_be_used_are_counted(turn, text, reason):
    for retries in (0, 2):
        found = outcomes(always((turn, text)), retries=retries)
        assert found.reasons() == {reason: 10 * (retries + 1)}
        assert [outcome.attempts for _, outcome in found.jobs] == [retries + 1] * 10
        edits = [refused.edit for _, outcome in found.jobs for _, refused in outcome.refused]
        assert {(edit.turn, edit.utterance) for edit in edits} == {(turn, text)}


def test_a_second_answer_that_is_good_is_taken():
    logs = [one for one in LOGS if one.messages[1].content != ASK][:10]
    found = outcomes(Says(lambda task, n: [Edit(1, "so", ASK)] if n else BadAnswer("prose", "no JSON", "Hm.")), logs)
    assert [(len(outcome.made), outcome.attempts) for _, outcome in found.jobs] == [(1, 2)] * 10
    assert found.reasons() == {"prose": 10}
    first = {"turn": 1, "by": "controller", "model": "says", "prompt": "asked", "seed": 17, "round": 1}
    assert found.made[0].provenance["regenerated"]["turns"][0] == first


def test_good_edits_beside_bad_ones_are_taken():
    logs = [one for one in LOGS if one.messages[1].content not in (ASK, REQUEST) and len(one.agent_turns) > 1][:10]
    found = outcomes(always((1, ASK), (0, ASK), (1, f" {ASK}\n"), (1, REQUEST), (3, ASK)), logs)
    assert found.reasons() == {"not the agent's turn": 10, "duplicate": 10, "more than asked for": 20}
    assert [outcome.attempts for _, outcome in found.jobs] == [1] * 10
    assert [one.messages[1].content for one in found.made] == [ASK] * 10


def test_no_edit_says_that_nothing_was_at_fault():
    found = outcomes(always())
    assert [(o.no_fault, o.attempts, o.refused, o.made) for _, o in found.jobs] == [(True, 1, [], [])] * 10


def test_a_request_that_is_refused_is_not_made_again():
    found = outcomes(Says(lambda task, attempt: RequestError("too long")))
    assert found.reasons() == {"request refused": 10}
    assert [(outcome.attempts, outcome.unfinished) for _, outcome in found.jobs] == [(1, None)] * 10


def test_dialogues_that_are_there_already_are_dropped():
    logs = [one for one in LOGS if one.messages[1].content != REQUEST][:2]
    found = outcomes(always((1, REQUEST)), logs, counts=(10,))
    # after a request the talk is over, so that all that are made of one dialogue are alike
    assert sorted(root_of(one) for one in found.made) == sorted(one.id for one in logs)
    assert [one.messages[1].content for one in found.made] == [REQUEST] * 2
    assert found.reasons() == {"duplicate": len(found.jobs) - 2}


# --- what goes wrong on the way


class Failing(Replay):
    """Fails for some dialogues."""

    def __init__(self, names, error):
        super().__init__(charity, Charity)
        self.names, self.error, self.asked = set(names), error, 0

    def complete(self, source, prefix, seed):
        self.asked += 1
        time.sleep(0.01)  # so that one ends after the other
        if source.id in self.names:
            raise self.error
        return super().complete(source, prefix, seed)


def test_an_engine_that_fails_now_and_then_leaves_those_unfinished():
    names = [LOGS[i].id for i in range(0, 60, 7)]
    found = outcomes(None, LOGS, Failing(names, EngineError("connection reset")), concurrency=1)
    whole = outcomes(None, LOGS)
    assert {d.id for d, outcome in found.jobs if outcome.unfinished} <= set(names)
    for (dialogue, outcome), (_, expected) in zip(found.jobs, whole.jobs, strict=True):
        if dialogue.id in names and expected.made:
            assert (outcome.made, outcome.unfinished) == ([], "connection reset")
        else:
            assert (outcome.made, outcome.unfinished) == (expected.made, None)
    assert sum(outcome.unfinished is not None for _, outcome in found.jobs) > 5


def test_five_failures_in_a_row_stop_the_run():
    failing = Failing(BY_ID, EngineError("gone"))
    with pytest.raises(EngineError, match=r"(?s)^5 dialogues in a row got no answer.*gone.*kept"):
        outcomes(None, LOGS, failing, concurrency=1)
    assert failing.asked < 30
    controller = Says(lambda task, attempt: EngineError("gone"))
    few = outcomes(controller, LOGS[:2])  # two say nothing of the endpoint
    assert [outcome.unfinished for _, outcome in few.jobs] == ["gone", "gone"]
    assert [attempt for _, attempt, _ in controller.asked] == [0, 0]


def test_a_forward_model_whose_words_cannot_be_used_is_counted():
    failing = Failing(BY_ID, BadAnswer("user: empty text", "the user said nothing", " "))
    found = outcomes(None, LOGS, failing)
    assert set(found.reasons()) == {"user: empty text"}
    assert found.reasons().total() == failing.asked > 30
    assert all(outcome.unfinished is None and outcome.attempts == 1 for _, outcome in found.jobs)
    assert all(refused.edit and refused.answer == " " for _, o in found.jobs for _, refused in o.refused)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_budget_that_is_spent_leaves_the_rest(concurrency):
    meter = Meter(requests=13)

    class Counted:
        name = "counted"

        def propose(self, task, attempt=0, complaint=None):
            with meter.request("controller", 1):
                return SCRIPTED.propose(task, attempt, complaint)

    first, *rest = regenerate(LOGS, parts(Counted()), Settings(rounds=2, concurrency=concurrency, seed=5))
    left = [outcome.unfinished for _, outcome in first.jobs]
    assert Counter(left) == {None: 13, "budget": 47}
    if concurrency == 1:
        assert left[:13] == [None] * 13
        whole = outcomes(None, LOGS).jobs[:13]
        assert [d.messages for d in first.made] == [d.messages for _, outcome in whole for d in outcome.made]
    assert all(outcome.unfinished == "budget" for found in rest for _, outcome in found.jobs)


def test_a_log_that_the_environment_does_not_play_has_no_way_back():
    log = next(one for one in LOGS if len(one.agent_turns) == 2 and one.messages[3].content != REQUEST)
    words = list(log.messages)
    words[2] = Message("user", "I am a duck.")
    other_words = replace(log, messages=tuple(words))
    other_seed = replace(log, provenance={**log.provenance, "seed": log.provenance["seed"] + 1})
    nothing = replace(log, provenance={})
    longer = (*log.messages, Message("assistant", "One more thing."))
    too_long = replace(log, messages=longer, rewards=(0.0,) * len(longer))
    for wrong, turn in ((other_words, 3), (other_seed, 3), (nothing, 1), (too_long, 5)):
        found = outcomes(always((turn, ASK)), [wrong], retries=0)
        assert found.reasons() == {"no way back": 1}, wrong
        assert not found.made
    assert outcomes(always((3, REQUEST)), [log]).made
    assert len(outcomes(always((1, ASK)), [other_words]).made) == 1  # it was edited before the place
