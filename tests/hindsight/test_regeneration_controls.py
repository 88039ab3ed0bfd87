"""What keeps regeneration honest: controls that know no more than they may, of equal size; ids; costs that are foreseen."""

import json
from collections import Counter

import pytest

from llmrl.cli import main
from llmrl.hindsight.dialogues import Dialogue, read_dialogues
from llmrl.hindsight.envs import charity
from llmrl.hindsight.envs.charity import Charity
from llmrl.hindsight.regeneration.asking import Answer
from llmrl.hindsight.regeneration.controllers import Foresight, ModelController, Proposal, RandomEdits, Task
from llmrl.hindsight.regeneration.edits import Edit
from llmrl.hindsight.regeneration.estimate import estimate
from llmrl.hindsight.regeneration.forward import Continuation, Replay
from llmrl.hindsight.regeneration.options import RegenerateConfig
from llmrl.hindsight.regeneration.rewards import RuleReward
from llmrl.hindsight.regeneration.rounds import Parts, Settings, regenerate
from llmrl.types import Message

LOGS = charity.logs(30, 2)
SECRET = Dialogue(
    "s",
    tuple(
        Message(("user", "assistant")[i % 2], text)
        for i, text in enumerate(
            ("Hello?", "Hi there.", "My uncle Bartholomew told me never to give.", "I see.", "Bye.")
        )
    ),
    (0, 0, 0, 1, 0),
    task="charity",
)


class Model:
    """Answers by a function of the last message, and remembers what it was asked."""

    name = "model"

    def __init__(self, say):
        self.say, self.asked = say, []

    def ask(self, messages, seed, schema=None):
        self.asked.append("\n".join(message.content for message in messages))
        return Answer(self.say(messages[-1].content), False, f"hash-{len(self.asked)}")


class Ends:
    """A forward model that ends each dialogue at once."""

    name = agent_name = "ends"

    def complete(self, source, prefix, seed):
        messages = (*prefix, Message("user", "Bye."))
        return Continuation(messages, (0.0,) * len(messages), True, False, ((len(prefix), "user", None, seed),))


def edits_of(*pairs):
    return json.dumps({"edits": [{"turn": turn, "diagnosis": "d", "utterances": list(said)} for turn, *said in pairs]})


def rounds_of(controller, logs, forward=None, **settings):
    parts = Parts(controller, forward or Ends(), RuleReward(LOGS, exact=True))
    return regenerate(logs, parts, Settings(**{"concurrency": 1, **settings}))


def test_without_hindsight_nothing_of_what_comes_later_is_told_not_even_in_a_complaint():
    model = Model(lambda text: edits_of((1, "Is it because of Bartholomew?")))
    (found,) = rounds_of(Foresight(model), [SECRET], seed=3, edits=0, retries=3)
    assert found.reasons()["leak"] > 0
    assert len(model.asked) > 2
    before_it = [asked for asked in model.asked if "turn 1." in asked]
    assert before_it
    for asked in before_it:
        assert "Bartholomew" not in asked
        assert "[2]" not in asked
        assert "earned" not in asked
    assert any("another one is needed" in asked for asked in model.asked)


def test_with_hindsight_the_complaint_is_told():
    model = Model(lambda text: edits_of((1, "Is it because of Bartholomew?")))
    rounds_of(ModelController(model, 0.5), [SECRET], retries=1)
    assert "could not be used: the user says only later: bartholomew" in model.asked[1]
    assert "earned 1" in model.asked[0]
    assert "0.5 on average" in model.asked[0]


def test_without_hindsight_an_answer_for_another_turn_is_refused():
    model = Model(lambda text: edits_of((1, "Good day to you.")))
    for seed in range(8):
        proposal = Foresight(model).propose(Task(SECRET, (1, 3), 1, 1, seed))
        asked_for = 1 if "Write one utterance for turn 1" in model.asked[-1] else 3
        assert [edit.turn for edit in proposal.edits] == [1] * (asked_for == 1)
        assert [refused.reason for refused in proposal.refused] == ["another turn"] * (asked_for == 3)
    assert len({"for turn 1" in asked for asked in model.asked}) == 2


def test_without_hindsight_one_bad_answer_costs_its_turn_alone():
    model = Model(lambda text: "prose" if "for turn 1" in text else edits_of((3, "May I ask why?")))
    proposal = Foresight(model).propose(Task(SECRET, (1, 3), 2, 1, 0))
    assert [edit.turn for edit in proposal.edits] == [3]
    assert [refused.reason for refused in proposal.refused] == ["prose"]
    assert proposal.origin(3)[0] == "hash-2"


def test_one_turn_named_twice_makes_two_dialogues_with_ids_of_their_own():
    twice = edits_of((1, "What would you like to know?"), (1, "Tell me what you prefer."))
    (found,) = rounds_of(ModelController(Model(lambda text: twice), 0.0), [SECRET], edits=2, candidates=2)
    names = [one.id for one in found.made]
    assert len(names) == len(set(names)) == 2
    seeds = {one.provenance["regenerated"]["turns"][-1]["seed"] for one in found.made}
    assert len(seeds) == 2


@pytest.mark.parametrize(("edits", "candidates"), [(1, 1), (1, 3), (2, 2), (0, 1)])
def test_equal_size_is_equal_whatever_a_job_makes(edits, candidates):
    forward = Replay(charity, Charity)
    found = rounds_of(RandomEdits(LOGS), LOGS, forward, edits=edits, candidates=candidates, rounds=2, counts=(25, 10))
    assert [len(one.made) for one in found] == [25, 10]


def test_what_was_regenerated_can_be_regenerated_again_beside_its_logs(tmp_path):
    from llmrl.jsonl import write_objects

    logs = tmp_path / "logs.jsonl"
    write_objects(logs, [one.to_json() for one in LOGS])
    first, second, other = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "other"))
    told = ["hindsight", "regenerate", "--quiet", "--rounds", "2", "--data", str(logs)]
    assert main([*told, "--output", str(first)]) == 0
    assert main([*told, str(first), "--output", str(second)]) == 0
    assert main([*told, "--seed", "1", "--output", str(other), "--with_logs"]) == 0
    everything = read_dialogues([first, second, other]).dialogues  # no id twice
    counts = Counter(one.provenance.get("regenerated", {}).get("round") for one in everything)
    assert counts[None] == len(LOGS)
    assert set(counts) == {None, 1, 2, 3, 4}
    assert main([*told, "--output", str(logs), "--overwrite"]) == 2  # it would replace what it reads
    assert len(read_dialogues([logs]).dialogues) == len(LOGS)
    short = [*told[:-2], str(logs), "--data", str(logs)]
    assert (
        main(
            [
                *short,
                "--rounds",
                "3",
                "--control",
                "random",
                "--match",
                str(first),
                "--output",
                str(tmp_path / "x.jsonl"),
            ]
        )
        == 2
    )


def test_an_estimate_counts_what_would_be_asked():
    url = "m@http://127.0.0.1:1/v1"
    config = RegenerateConfig(
        data=["x.jsonl"], output="y.jsonl", controller=url, forward=url, reward=f"judge={url}", rounds=2, candidates=2,
        edits_per_dialogue=1,
    )  # fmt: skip
    found = estimate(config, LOGS[:10])
    roles = {row["role"]: row["requests"] for row in found["roles"]}
    assert roles["controller"] == 10 + 20
    assert found["most_new"] == 20 + 40
    assert roles["judge"] == 60 + 3 * 10  # logs are fewer than --calibration
    turns = sum(len(one.agent_turns) for one in LOGS[:10]) / 10
    assert roles["user"] == roles["agent"] == round((60 + 10) * max(1.0, turns / 2))


def test_an_estimate_of_the_control_without_hindsight_counts_each_turn_once():
    url = "m@http://127.0.0.1:1/v1"
    base = {"data": ["x.jsonl"], "output": "y.jsonl", "controller": url, "rounds": 1}
    one, two = (
        estimate(RegenerateConfig(**base, control="no_hindsight", edits_per_dialogue=k), LOGS)["roles"][0]
        for k in (1, 2)
    )
    assert two["requests"] == 2 * one["requests"] == 2 * len(LOGS)
    assert two["answer_tokens"] == pytest.approx(2 * one["answer_tokens"], abs=2)


def test_a_proposal_knows_where_each_edit_is_from():
    proposal = Proposal([Edit(1, "d", "u")], 7, "all", by_turn={3: ("three", 9)})
    assert proposal.origin(1) == ("all", 7)
    assert proposal.origin(3) == ("three", 9)
