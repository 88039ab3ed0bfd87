"""Whether a forward model is like the users of the logs: alarms where it pleases, silence where it is true."""

import json
import threading

import pytest

from llmrl.errors import EngineError, RequestError
from llmrl.hindsight.envs import charity
from llmrl.hindsight.envs.charity import APPEALS, Charity
from llmrl.hindsight.envs.charity_words import WORDS, understand
from llmrl.hindsight.regeneration.budget import Meter
from llmrl.hindsight.regeneration.edits import BadAnswer
from llmrl.hindsight.regeneration.forward import Replay
from llmrl.hindsight.regeneration.realism import Pair, agrees, compare, report
from llmrl.hindsight.regeneration.rewards import RuleReward

LOGS = charity.logs(150, 0)
REWARD = RuleReward(LOGS, exact=True)
TRUE = Replay(charity, Charity)


class Agreeable(Charity):
    """Likes every appeal."""

    def step(self, answer):
        act, _ = understand(answer.content, self.words)
        self.wants = act if act in APPEALS else self.wants
        return super().step(answer)


class Grumpy(Charity):
    """Likes no appeal."""

    def step(self, answer):
        act, _ = understand(answer.content, self.words)
        self.wants = "story" if act == "facts" else "facts"
        return super().step(answer)


class Changed(Replay):
    """The users of the logs up to the edited turn, others from there on."""

    def __init__(self, kind):
        super().__init__(charity, Charity, kind.__name__)
        self.kind = kind

    def at_the_edit(self, environment):
        environment.__class__ = self.kind
        return environment


class Failing(Replay):
    """Fails for some dialogues, whose errors it is given by id."""

    def __init__(self, errors):
        super().__init__(charity, Charity)
        self.errors = errors

    def complete(self, source, prefix, seed):
        if source.id in self.errors:
            raise self.errors[source.id]
        return super().complete(source, prefix, seed)


def real_pair(number, **values):
    same = {
        "real": 1.0,
        "simulated": 1.0,
        "real_reply": "",
        "simulated_reply": "",
        "real_turns": 2,
        "simulated_turns": 2,
    }
    return Pair(dialogue=str(number), turn=1, **{**same, **values})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_compare_true_users_raise_no_alarm(seed):
    found = compare(LOGS, TRUE, REWARD, count=150, seed=seed)
    assert (found["prefixes"], found["lost"], found["alarms"]) == (150, {}, [])
    for name in ("earned", "agreement", "reply_words", "agent_turns"):
        assert found[name]["difference"]["low"] <= 0 <= found[name]["difference"]["high"]
    assert found["earned"]["real"] == pytest.approx(sum(one.total for one in LOGS) / 150)
    # what is said right after the same words of the agent is the same, word for word
    assert found["agreement"]["difference"]["value"] == found["reply_words"]["difference"]["value"] == 0
    json.dumps(found, allow_nan=False)


def test_compare_users_who_like_every_appeal_raise_alarms():
    found = compare(LOGS, Changed(Agreeable), REWARD, count=150, seed=0)
    assert found["prefixes"] == 150
    assert found["earned"]["difference"]["low"] > 0
    assert found["agreement"]["difference"]["low"] > 0
    assert found["earned"]["simulated"] - found["earned"]["real"] == pytest.approx(
        found["earned"]["difference"]["value"]
    )
    more, oftener = found["alarms"]
    assert "give more" in more
    assert f"{found['earned']['simulated']:.3g}" in more
    assert "agree more often" in oftener


def test_compare_users_who_like_nothing_raise_none():
    found = compare(LOGS, Changed(Grumpy), REWARD, count=150, seed=0)
    assert found["earned"]["difference"]["high"] < 0
    assert found["agreement"]["difference"]["high"] < 0
    assert found["alarms"] == []


def test_compare_does_not_depend_on_how_many_are_under_way_or_on_the_order():
    done = []
    first = compare(LOGS, Changed(Agreeable), REWARD, count=40, seed=3, progress=lambda *told: done.append(told))
    again = compare(LOGS[::-1], Changed(Agreeable), REWARD, count=40, seed=3, concurrency=1)
    assert first == again
    assert sorted(done) == [(i + 1, 40) for i in range(40)]
    assert compare(LOGS, Changed(Agreeable), REWARD, count=40, seed=4) != first


def test_compare_takes_one_prefix_of_each_dialogue():
    taken, lock = [], threading.Lock()

    class Watching(Replay):
        def complete(self, source, prefix, seed):
            with lock:
                taken.append((source, tuple(prefix)))
            return super().complete(source, prefix, seed)

    compare(LOGS, Watching(charity, Charity), REWARD, count=60, seed=0)
    assert len({source.id for source, _ in taken}) == len(taken) == 60
    assert all(prefix == source.messages[: len(prefix)] and len(prefix) % 2 == 0 for source, prefix in taken)
    assert {len(prefix) for _, prefix in taken} >= {2, 4, 6}
    assert compare(LOGS[:12], TRUE, REWARD, count=500, seed=0)["prefixes"] == 12


def test_compare_too_few_prefixes_say_nothing():
    found = compare(LOGS, Changed(Agreeable), REWARD, count=9, seed=0)
    assert found["prefixes"] == 9
    assert found["alarms"] == ["only 9 prefixes could be compared with the logs, which says nothing"]
    assert not any("only" in alarm for alarm in compare(LOGS, TRUE, REWARD, count=10, seed=0)["alarms"])


def test_compare_counts_those_that_are_lost_by_reason():
    spent = Meter(tokens=0)

    class Spent(Failing):
        def complete(self, source, prefix, seed):
            if source.id == LOGS[5].id:
                with spent.request("user", 1):
                    pass
            return super().complete(source, prefix, seed)

    errors = {
        LOGS[0].id: BadAnswer("user: too long", "50 words"),
        LOGS[1].id: BadAnswer("user: too long", "60 words"),
        LOGS[2].id: BadAnswer("no way back", "other words"),
        LOGS[3].id: RequestError("longer than the context"),
        LOGS[4].id: EngineError("connection reset"),
    }
    found = compare(LOGS[:30], Spent(errors), REWARD, count=30, seed=0)
    assert found["prefixes"] == 24
    assert found["lost"] == {
        "budget": 1, "no answer": 1, "no way back": 1, "request refused": 1,
        "user: too long": 2,
    }  # fmt: skip
    assert found["alarms"] == []


def test_compare_with_nobody_there():
    gone = {one.id: EngineError("connection refused") for one in LOGS}
    with pytest.raises(EngineError, match=r"(?s)5 dialogues in a row.*connection refused"):
        compare(LOGS, Failing(gone), REWARD, count=20, seed=0)
    useless = {one.id: BadAnswer("user: empty text", "nothing") for one in LOGS}
    found = compare(LOGS, Failing(useless), REWARD, count=20, seed=0)
    assert found == {
        "prefixes": 0,
        "lost": {"user: empty text": 20},
        "alarms": ["the forward model could not be compared with the logs at all"],
    }


def test_report_of_known_pairs():
    pairs = [
        real_pair(
            i,
            real=float(i),
            simulated=i + 0.5,
            real_reply="No, never.",
            simulated_reply="Yes, I like that.",
            real_turns=3,
        )
        for i in range(10)
    ]
    found = report(pairs, ["b", "a", "b"], 0)
    assert (found["prefixes"], found["lost"]) == (10, {"a": 1, "b": 2})
    means = {name: (found[name]["real"], found[name]["simulated"]) for name in ("earned", "reply_words", "agent_turns")}
    assert means == {"earned": (4.5, 5.0), "reply_words": (2.0, 4.0), "agent_turns": (3.0, 2.0)}
    # every difference is the same, which leaves no room for chance
    assert found["earned"]["difference"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert (found["agreement"]["real"], found["agreement"]["simulated"]) == (0.0, 1.0)
    assert len(found["alarms"]) == 2


def test_report_pairs_differences():
    """What differs between dialogues, and not between the users, is no part of the interval."""
    pairs = [real_pair(i, real=100.0 * i, simulated=100.0 * i + (-1) ** i) for i in range(40)]
    found = report(pairs, [], 0)["earned"]["difference"]
    assert found["value"] == 0
    assert -0.5 < found["low"] < 0 < found["high"] < 0.5  # 1.96 / sqrt(40) is 0.31
    assert found["low"] == pytest.approx(-0.31, abs=0.05)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Yes, please go on.", True),
        ("That sounds good to me.", True),
        ("OK", True),
        ("I'd LOVE to.", True),
        ("No, thanks.", False),
        ("I don't like this.", False),
        ("Yesterday it rained.", False),
        ("Who is this?", False),
        ("", False),
    ],
)
def test_agrees(text, found):
    assert agrees(text) is found


def test_agrees_with_what_the_users_of_the_talk_mean():
    for words in WORDS.values():
        for reply in ("helped", "gives 2"):
            assert any(agrees(text) for text in words.replies[reply])
        for reply in ("annoyed", "leaves", "gives 0"):
            assert not any(agrees(text) for text in words.replies[reply])
