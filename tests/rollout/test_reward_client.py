"""The client of a reward model over HTTP: raw scores in the order of the texts, and what it does when a server fails."""

import math

import pytest
from fake_vllm import FakeVllm

from llmrl.errors import DataError, EngineError, RequestError
from llmrl.rollout.protocols import RewardClient
from llmrl.rollout.rewards import HttpRewardClient

TEXTS = ["a" * n for n in range(1, 11)]
RIGHT = [[float(n), 0.5] for n in range(1, 11)]


@pytest.fixture
def servers():
    pair = [FakeVllm(None), FakeVllm(None)]
    yield pair
    for fake in pair:
        if not fake.stopping.is_set():
            fake.stop()


@pytest.fixture
def client(servers):
    opened = []

    def open_on(fakes=servers, **options):
        opened.append(HttpRewardClient([fake.url for fake in fakes], **({"batch_size": 3, "patience": 0.4} | options)))
        return opened[-1]

    yield open_on
    for one in opened:
        one.close()


def test_scores_in_order_and_without_activation(client, servers):
    one = client()
    assert isinstance(one, RewardClient)
    assert one.scores(TEXTS) == RIGHT
    assert one.outputs == 2
    bodies = [body for fake in servers for path, body in fake.seen if path == "/classify"]
    assert sorted(len(body["input"]) for body in bodies) == [1, 3, 3, 3]
    assert all(body["use_activation"] is False and body["model"] == "stories" for body in bodies)
    assert one.scores([]) == []


def test_scores_are_asked_with_the_key_of_the_environment(client, servers, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k1")
    client().scores(TEXTS)
    assert servers[0].keys | servers[1].keys == {"Bearer k1"}


def classified(rows):
    return {"data": [{"index": i, "probs": row} for i, row in enumerate(rows)]}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (classified([[1.0]]), "scores of 1 texts, expected 3"),
        (classified([[1.0], [1.0, 2.0], [3.0]]), "rows of different lengths"),
        (classified([[1.0], [math.nan], [3.0]]), "a score that is not finite"),
        (classified([[]] * 3), "or empty ones"),
        ({"data": None}, "no classification"),
    ],
)
def test_scores_that_do_not_hold_up_are_asked_of_another_server(answer, words, client, servers):
    one = client(batch_size=3)
    bad = servers[0]
    real = bad.answer
    bad.answer = lambda method, path, body: (200, answer) if path == "/classify" else real(method, path, body)
    assert one.scores(TEXTS[:9]) == RIGHT[:9]
    servers[1].stop()
    with pytest.raises(EngineError) as caught:
        one.scores(TEXTS[:3])
    assert words in str(caught.value)


def test_scores_errors(client, servers):
    one = client()
    for fake in servers:
        fake.fault = lambda path, body: (400, "the text is too long") if path == "/classify" else None
    with pytest.raises(RequestError, match=r"refused the request \(400\): the text is too long"):
        one.scores(TEXTS)
    with pytest.raises(DataError, match="text 1: expected a text that is not empty"):
        one.scores(["a", ""])
    for fake in servers:
        fake.fault = lambda path, body: (500, "broken") if path == "/classify" else None
    with pytest.raises(EngineError, match="500 broken"):
        one.scores(TEXTS)
    with pytest.raises(EngineError, match="expected nobody: name the served model"):
        client(model="nobody")
    for fake in servers:
        fake.stop()
    with pytest.raises(EngineError, match="llmrl serve REWARD_MODEL"):
        client()


def test_scores_refuses_an_exchanged_model(client, servers):
    one = client()
    one.scores(TEXTS)
    for fake in servers:
        fake.answer = lambda method, path, body: (200, classified([[1.0, 2.0, 3.0]] * len(body["input"])))
    with pytest.raises(EngineError, match=r"different numbers of scores \(\[2, 3\]\)"):
        one.scores(TEXTS)
