"""Simulated users: who speaks, how it ends, and what an endpoint on the network may do to a run."""

import json
import threading
import time

import pytest
from chat_endpoint import ChatServer
from episodes_run import ByteTokenizer, engine, play

from llmrl.errors import EngineError, RequestError, UsageError
from llmrl.rollout.environment import Environment
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import read_shards
from llmrl.rollout.users import ChatEndpoint, EngineChat, SimulatedUser, as_user
from llmrl.types import Episode, Message, SamplingConfig

KEY = "sk-not-for-any-file"


def user(text):
    return Message("user", text)


def model(text):
    return Message("assistant", text)


def script(*said):
    """A user who says these in turn."""
    left = list(said)
    return lambda messages: left.pop(0)


@pytest.fixture
def server():
    made = ChatServer()
    yield made
    made.stop()


@pytest.fixture
def ask(server):
    """`ask(*answers, **options)`: the text an endpoint's client makes of these answers."""
    clients = []

    def ask_once(*answers, **options):
        server.answers = list(answers)
        clients.append(ChatEndpoint(server.url, "m", **{"backoff": 0.01, "timeout": 5, **options}))
        return clients[-1]([user("hello")], 7)

    yield ask_once
    for client in clients:
        client.close()


# the environment


def test_scripted_user_opens_answers_and_stops_at_the_phrase():
    heard = []

    def speak(messages):
        heard.append([m.content for m in messages])
        return ["hello", "why?", "I see. STOP"][len(heard) - 1]

    world = SimulatedUser(speak, context=[Message("system", "be kind")], stop="STOP")
    assert isinstance(world, Environment)
    assert list(world.observe()) == [Message("system", "be kind"), user("hello")]
    step = world.step(model("hi STOP"))  # the phrase is the user's to say
    assert (step.messages, step.done, step.truncated) == ((user("why?"),), False, False)
    step = world.step(model("so"))
    assert (step.messages, step.done) == ((user("I see. STOP"),), True)
    assert heard[2] == ["be kind", "hello", "hi STOP", "why?", "so"]


def test_stop_function_is_asked_after_each_message_of_either_side():
    seen = []

    def deal(messages):
        seen.append(messages[-1].content)
        return messages[-1].content == "deal"

    world = SimulatedUser(script("5?", "6?", "never said"), stop=deal)
    world.observe()
    assert not world.step(model("7")).done
    step = world.step(model("deal"))
    assert (step.messages, step.done) == ((), True)
    assert seen == ["7", "6?", "deal"]


def test_max_user_turns_truncates_after_the_answer_to_the_last():
    world = SimulatedUser(script("a", "b"), max_user_turns=2)
    world.observe()
    assert world.step(model("1")).messages == (user("b"),)
    step = world.step(model("2"))
    assert (step.messages, step.done, step.truncated) == ((), False, True)
    with pytest.raises(UsageError, match="max_user_turns"):
        SimulatedUser(script(), max_user_turns=0)


def test_reward_sees_the_dialogue_and_whether_it_is_over():
    calls = []

    def reward(messages, over):
        calls.append(([m.content for m in messages], over))
        return {"length": len(messages)}

    world = SimulatedUser(script("a", "b"), max_user_turns=2, reward=reward)
    world.observe()
    assert world.step(model("1")).rewards == {"length": 3}
    assert world.step(model("2")).rewards == {"length": 4}
    assert calls == [(["a", "1", "b"], False), (["a", "1", "b", "2"], True)]


def test_model_as_user_sees_the_roles_swapped_and_a_seed_a_turn():
    asked = []

    def chat(messages, seed):
        asked.append((messages, seed))
        return f"u{len(asked)}"

    speak = as_user(chat, "you are a buyer", 3)
    opening = [Message("system", "the agent's own prompt")]
    assert speak(opening) == "u1"
    speak([*opening, user("u1"), model("a1"), Message("tool", "secret"), model("a2"), user("u2"), model("a3")])
    assert asked[0] == ([Message("system", "you are a buyer"), user("Begin the conversation.")], derive_seed(3, 0))
    assert asked[1][0][2:] == [model("u1"), user("a1\na2"), model("u2"), user("a3")]
    assert asked[1][1] == derive_seed(3, 2)


def test_engine_as_user_plays_and_is_never_trained_on(tmp_path):
    prompts = []

    def buyer(request):
        prompts.append((ByteTokenizer().decode(request.token_ids), request.sampling.seed))
        return f"offer {len(prompts)}"

    with engine(buyer) as other:

        def make(row, seed):
            chat = EngineChat(other, SamplingConfig(max_tokens=50))
            return SimulatedUser(as_user(chat, "buy", seed, opener="go"), max_user_turns=2)

        summary = play(tmp_path, [{"id": "a"}], make, script=lambda request: "no", seed=4)
    assert summary.truncated == {"environment": 1}
    seed = derive_seed(4, "a", 0, "environment")
    assert prompts == [
        ("system:buyuser:goassistant:", derive_seed(seed, 0)),
        ("system:buyuser:goassistant:offer 1user:noassistant:", derive_seed(seed, 1)),
    ]
    episode = Episode.from_json(read_shards(tmp_path)["a", 0])
    assert [(t.message.role, any(t.loss_mask)) for t in episode.turns] == [
        ("user", False), ("assistant", True), ("user", False), ("assistant", True),
    ]  # fmt: skip


# the endpoint


def test_endpoint_sends_a_chat_request_and_returns_its_text(server, ask):
    assert ask("hi there", options={"temperature": 0.5}) == "hi there"
    assert server.requests == [
        {
            "path": "/v1/chat/completions",
            "key": None,
            "model": "m",
            "messages": [{"role": "user", "content": "hello"}],
            "seed": 7,
            "temperature": 0.5,
        }
    ]
    ask("hi", options={"seed": None})
    assert "seed" not in server.requests[-1]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_endpoint_asks_again_when_a_server_stumbles(server, ask, status):
    assert ask((status, "wait"), (status, "wait"), "well") == "well"
    assert len(server.requests) == 3


def test_endpoint_waits_longer_each_time_and_as_long_as_it_is_told(ask, monkeypatch):
    waits = []
    monkeypatch.setattr("llmrl.rollout.users.time.sleep", waits.append)
    stumbles = [(500, ""), (500, ""), (429, "", ("retry-after", "7")), (503, "", ("retry-after", "900")), "well"]
    assert ask(*stumbles, backoff=4.0) == "well"
    assert 2 <= waits[0] <= 4 <= waits[1] <= 8
    assert waits[2:] == [7, 60]


def test_endpoint_that_stays_down_is_an_engine_error(server, ask):
    with pytest.raises(EngineError, match=r"gave no answer in 3 tries \(HTTP 500: on fire\); is it running"):
        ask((500, "on fire"), retries=2)
    assert len(server.requests) == 3
    server.stop()
    with pytest.raises(EngineError, match=r"gave no answer in 2 tries \(ConnectError"):
        ask("never", retries=1)


def test_endpoint_that_never_answers_is_an_engine_error_in_time(ask):
    released = threading.Event()
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"2 tries \(ReadTimeout"):
        ask(lambda body: (200, str(released.wait(20))), timeout=0.2, retries=1)
    assert time.monotonic() - begun < 10
    released.set()


@pytest.mark.parametrize("garbage", ["<html>hello</html>", "[]", '{"choices": []}', '{"choices": [{"text": "x"}]}'])
def test_garbage_is_an_engine_error_at_once(server, ask, garbage):
    with pytest.raises(EngineError, match="something that is not a chat completion"):
        ask((200, garbage))
    assert len(server.requests) == 1


def test_answer_without_text_and_refused_request_are_the_requests_own_errors(server, ask):
    with pytest.raises(RequestError, match="expected an answer in text, got none"):
        ask((200, '{"choices": [{"message": {"content": null}}]}'))
    with pytest.raises(RequestError, match="HTTP 400: too long"):
        ask((400, "too long"))
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404, 301])
def test_endpoint_that_refuses_everyone_is_an_engine_error(server, ask, status):
    with pytest.raises(EngineError, match=f"HTTP {status}.*check the URL, model 'm' and api_key_env"):
        ask((status, "no"))
    assert len(server.requests) == 1


def test_key_comes_from_the_environment_and_reaches_the_server_alone(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOY_KEY", KEY)
    server.answers = [lambda body: (400, f"wrong key {KEY}")]
    endpoint = ChatEndpoint(server.url, "m", api_key_env="TOY_KEY")
    play(tmp_path, [{}], lambda row, seed: SimulatedUser(as_user(endpoint, "buy", seed)))
    assert server.requests[0]["key"] == f"Bearer {KEY}"
    (record,) = read_shards(tmp_path).values()
    assert "HTTP 400: wrong key ***" in record["error"]
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in repr(vars(endpoint)) + capsys.readouterr().err
    endpoint.close()


def test_missing_key_and_wrong_url_are_refused_at_once(monkeypatch):
    monkeypatch.delenv("TOY_KEY", raising=False)
    with pytest.raises(UsageError, match="TOY_KEY is not set"):
        ChatEndpoint("http://127.0.0.1:1/v1", "m", api_key_env="TOY_KEY")
    with pytest.raises(UsageError, match="expected a URL"):
        ChatEndpoint("127.0.0.1:1/v1", "m")


def test_endpoint_as_user_of_many_episodes_at_once(server, tmp_path):
    server.answers = [
        lambda body: (200, json.dumps({"choices": [{"message": {"content": str(len(body["messages"]))}}]}))
    ]
    endpoint = ChatEndpoint(server.url, "m")

    def make(row, seed):
        return SimulatedUser(as_user(endpoint, "buy", seed), max_user_turns=3)

    summary = play(tmp_path, [{} for _ in range(20)], make, concurrency=20)
    endpoint.close()
    assert summary.truncated == {"environment": 20}
    for record in read_shards(tmp_path).values():
        said = [turn.message.content for turn in Episode.from_json(record).turns if turn.message.role == "user"]
        assert said == ["2", "4", "6"]
