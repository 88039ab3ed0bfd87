"""Answers that are kept and never asked for twice, and what asking may cost: budgets under threads, the idle time."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import pytest
from chat_endpoint import ChatServer

from llmrl.errors import DataError, EngineError, OutputError
from llmrl.hindsight.regeneration import budget
from llmrl.hindsight.regeneration.answers import Answers, key_of
from llmrl.hindsight.regeneration.asking import Asker, EndpointSource, split_endpoint
from llmrl.hindsight.regeneration.budget import BudgetSpent, Meter
from llmrl.rollout.users import ChatEndpoint
from llmrl.types import Message

ASKED = [Message("system", "Be kind."), Message("user", "Hello?")]


def shard(folder):
    (path,) = (folder / "shards").glob("*.jsonl")
    return path


def test_answers_are_there_again(tmp_path):
    with Answers(tmp_path) as answers:
        answers.put("a", {"text": "first"})
        answers.put("b", {"text": "second \ud83d \u2028"})
        assert (len(answers), answers.get("a"), answers.get("c")) == (2, {"text": "first"}, None)
    with Answers(tmp_path) as answers:
        assert (len(answers), answers.get("a")) == (2, {"text": "first"})
        assert answers.get("b") == {"text": "second \ud83d \u2028"}
        answers.put("c", {"text": "third"})
    with Answers(tmp_path) as answers:
        assert len(answers) == 3


def test_answers_after_a_kill_in_the_middle_of_a_line(tmp_path, capfd):
    with Answers(tmp_path) as answers:
        for name in "abc":
            answers.put(name, {"text": name * 50})
    path = shard(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with Answers(tmp_path) as answers:
        assert [answers.get(name) is not None for name in "abc"] == [True, True, False]
        answers.put("c", {"text": "again"})
    assert "torn line" in capfd.readouterr().err
    with Answers(tmp_path) as answers:
        assert answers.get("c") == {"text": "again"}
    assert capfd.readouterr().err == ""


def test_answers_are_with_the_system_before_the_folder_is_closed(tmp_path):
    with Answers(tmp_path) as answers:
        answers.put("a", {"text": "first"})
        assert b"first" in shard(tmp_path).read_bytes()


def test_answers_have_one_writer(tmp_path):
    with Answers(tmp_path) as one, Answers(tmp_path) as other:
        one.put("a", {"text": "first"})
        with pytest.raises(OutputError, match="another process"):
            other.put("b", {"text": "second"})
    with Answers(tmp_path) as again:
        again.put("b", {"text": "second"})


def test_answers_from_many_threads(tmp_path):
    names = [str(i) for i in range(200)]
    with Answers(tmp_path) as answers, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: answers.put(name, {"text": name * 20}), names))
    with Answers(tmp_path) as answers:
        assert [answers.get(name) for name in names] == [{"text": name * 20} for name in names]


def test_answers_hold_json_alone(tmp_path):
    with Answers(tmp_path) as answers:
        with pytest.raises(DataError):
            answers.put("a", {"score": math.nan})
        assert answers.get("a") is None


def test_key_of_depends_on_every_part_and_not_on_the_order_of_keys():
    assert key_of({"a": 1, "b": [2, None]}, "x", 3) == key_of({"b": [2, None], "a": 1}, "x", 3)
    others = [
        key_of({"a": 1, "b": [2, None]}, "x", 4),
        key_of({"a": 1, "b": [2, None]}, "y", 3),
        key_of({"a": 1, "b": [None, 2]}, "x", 3),
        key_of({"a": 1, "b": [2, None]}, "x3"),
        key_of({"a": 1, "b": [2, None]}, "x", 3, None),
        key_of({"a": 1, "b": [2, None]}, "x", "3"),
    ]
    assert len({*others, key_of({"a": 1, "b": [2, None]}, "x", 3)}) == 7
    with pytest.raises(ValueError, match="JSON"):
        key_of(math.nan)


@pytest.mark.parametrize("each", [5, 10])
def test_meter_never_goes_over_the_budget(each):
    meter, refused, most_ever = Meter(tokens=103), [], []

    def one(number):
        try:
            with meter.request("user", 10) as cost:
                most_ever.append(meter.spent + meter._reserved)
                cost.prompt, cost.completion = 2, each - 2
        except BudgetSpent:
            refused.append(number)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(60)))
    assert max(most_ever) <= 103
    # while 10 are left another is let through; all that take so much less than they may are let through in the end
    assert 93 < meter.spent <= 103
    assert meter.asked["user"] == meter.spent // each == 60 - len(refused)
    assert meter.spent == meter.prompt_tokens["user"] + meter.completion_tokens["user"]


def test_meter_waits_for_what_is_under_way():
    meter, begun, go_on, order = Meter(tokens=15), threading.Event(), threading.Event(), []

    def slow():
        with meter.request("user", 10) as cost:
            begun.set()
            go_on.wait(10)
            order.append("slow")
            cost.completion = 3

    def other():
        begun.wait(10)
        with meter.request("agent", 10) as cost:
            order.append("other")
            cost.completion = 10

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(slow), pool.submit(other)]
        begun.wait(10)
        threading.Timer(0.1, go_on.set).start()
        [future.result(10) for future in futures]
    assert (order, meter.spent) == (["slow", "other"], 13)


def test_meter_gives_up_when_what_was_under_way_took_it():
    meter, begun, go_on = Meter(tokens=15), threading.Event(), threading.Event()

    def slow():
        with meter.request("user", 10) as cost:
            begun.set()
            go_on.wait(10)
            cost.completion = 6

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(slow)
        begun.wait(10)
        threading.Timer(0.1, go_on.set).start()
        with pytest.raises(BudgetSpent, match="6 of 15 tokens"), meter.request("agent", 10):
            pass
        future.result(10)
    with pytest.raises(BudgetSpent), meter.request("agent", 16):
        pass


def test_meter_lets_go_of_what_a_failed_request_held():
    meter = Meter(tokens=10)
    for _ in range(3):
        with pytest.raises(EngineError), meter.request("user", 10):
            raise EngineError("gone")
    with meter.request("user", 10) as cost:
        cost.completion = 10
    assert meter.to_json()["tokens"] == 10


def test_meter_counts_requests_of_all_roles():
    meter = Meter(requests=3)
    for role in ("user", "agent", "user"):
        with meter.request(role, 10**9):
            pass
    for _ in range(3):
        meter.remember("judge")
    with pytest.raises(BudgetSpent, match="3 requests"), meter.request("judge", 1):
        pass
    found = meter.to_json()
    assert (found["requests"], found["answers_known"], found["budget_requests"]) == (3, 3, 3)
    assert {role: one["requests"] for role, one in found["roles"].items()} == {"agent": 1, "judge": 0, "user": 2}
    assert found["roles"]["judge"]["seconds_each"] is None


def test_meter_requests_under_threads():
    meter = Meter(requests=7)

    def one(_):
        try:
            with meter.request("user", 1):
                return 1
        except BudgetSpent:
            return 0

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(one, range(100))) == 7


def test_meter_idle_share_of_known_times(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: clock[0])
    meter = Meter()
    assert meter.to_json()["idle_share"] is None
    # two requests from 100 to 104 and from 102 to 105, nothing until 108, one until 110, nothing any more
    first, second, third = (meter.request(role, 1) for role in ("user", "agent", "user"))
    first.__enter__()
    clock[0] = 102.0
    second.__enter__()
    clock[0] = 104.0
    first.__exit__(None, None, None)
    clock[0] = 105.0
    second.__exit__(None, None, None)
    clock[0] = 108.0
    third.__enter__()
    clock[0] = 110.0
    third.__exit__(None, None, None)
    clock[0] = 150.0
    found = meter.to_json()
    assert found["seconds"] == pytest.approx(10)
    assert found["idle_share"] == pytest.approx(3 / 10)
    assert found["under_way_mean"] == pytest.approx((4 + 3 + 2) / 10)
    assert found["roles"]["user"]["seconds_each"] == pytest.approx(3)
    assert found["roles"]["agent"]["seconds_each"] == pytest.approx(3)


def test_meter_a_part_may_spend_a_share():
    meter = Meter(tokens=40, requests=100)
    with meter.at_most(0.25):
        with meter.request("user", 10) as cost:
            cost.completion = 10
        with pytest.raises(BudgetSpent), meter.request("user", 1):
            pass
    with meter.request("user", 30) as cost:
        cost.completion = 30
    assert (meter.spent, meter.tokens, meter.requests) == (40, 40, 100)


@dataclass
class Echo:
    """Says what it was asked, and the seed."""

    name: str = "echo"
    identity: dict = field(default_factory=lambda: {"model": "echo"})
    asked: int = 0
    cut: bool = False

    def most(self, messages):
        return 20

    def answer(self, messages, seed, schema, cost):
        self.asked += 1
        cost.prompt, cost.completion = 7, 5
        return f"{messages[-1].content} {seed} {schema}", self.cut


def test_asker_asks_once(tmp_path):
    source, meter = Echo(), Meter()
    with Answers(tmp_path) as answers:
        asker = Asker(source, "user", answers, meter)
        first = asker.ask(ASKED, 1)
        assert (first.text, first.cut) == ("Hello? 1 None", False)
        assert asker.ask(ASKED, 1) == first
        assert (source.asked, meter.asked["user"], meter.known["user"], meter.spent) == (1, 1, 1, 12)
        assert asker(ASKED, 1) == first.text
    again, meter = Echo(cut=True), Meter(tokens=1)
    with Answers(tmp_path) as answers:
        asker = Asker(again, "judge", answers, meter)
        assert asker.ask(ASKED, 1) == first  # a budget of nothing is enough for what is known
        assert (again.asked, meter.spent, meter.known["judge"]) == (0, 0, 1)
        with pytest.raises(BudgetSpent):
            asker.ask(ASKED, 2)


def test_asker_keeps_apart_whatever_decides_an_answer(tmp_path):
    source, meter = Echo(), Meter()
    with Answers(tmp_path) as answers:
        ask = Asker(source, "user", answers, meter).ask
        ask(ASKED, 1)
        ask(ASKED, 2)
        ask(ASKED, 1, {"type": "object"})
        ask(ASKED[1:], 1)
        ask([ASKED[0], Message("assistant", "Hello?")], 1)
        other = Echo(identity={"model": "echo", "sampling": {"temperature": 0}})
        Asker(other, "user", answers, meter).ask(ASKED, 1)
        assert (source.asked, other.asked, len(answers)) == (5, 1, 6)
        hashes = {ask(ASKED, seed).prompt_hash for seed in (1, 2)}
        assert len(hashes) == 1
        assert hashes != {ask(ASKED[1:], 1).prompt_hash}


def test_asker_keeps_nothing_of_a_question_that_failed(tmp_path):
    class Gone(Echo):
        def answer(self, *args):
            super().answer(*args)
            raise EngineError("gone")

    with Answers(tmp_path) as answers:
        with pytest.raises(EngineError):
            Asker(Gone(), "user", answers, Meter()).ask(ASKED, 1)
        assert len(answers) == 0


def test_asker_of_an_endpoint(tmp_path):
    meter = Meter(tokens=1000)
    with ChatServer() as server, Answers(tmp_path) as answers, closing(ChatEndpoint(server.url, "m")) as endpoint:
        server.answers = ["Hi."]
        source = EndpointSource(endpoint, 32, 0.5)
        assert source.most(ASKED) == len("Be kind.") + len("Hello?") + 2 * 16 + 32
        asker = Asker(source, "controller", answers, meter)
        for _ in range(2):
            assert asker.ask(ASKED, 5, {"type": "object"}).text == "Hi."
        (request,) = server.requests
    assert (request["model"], request["max_tokens"], request["temperature"], request["seed"]) == ("m", 32, 0.5, 5)
    assert request["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert 0 < meter.spent <= source.most(ASKED)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("http://a/v1", (None, "http://a/v1")),
        ("m@https://a/v1", ("m", "https://a/v1")),
        ("org/m@http://a/v1", ("org/m", "http://a/v1")),
        ("org/m", None),
        ("a@b", None),
        ("scripted", None),
    ],
)
def test_split_endpoint(text, found):
    assert split_endpoint(text) == found
