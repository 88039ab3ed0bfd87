"""Opening the client of several servers: what it checks of them, and which it refuses."""

import pytest
from server_support import GREEDY, ask

from llmrl.errors import EngineError, RequestError, UsageError
from llmrl.rollout.server import ServerEngine


def test_open_names_the_server_that_is_odd(fakes, client):
    servers = fakes(None, None) + fakes(None, length=32)
    with pytest.raises(EngineError) as caught:
        client(servers)
    text = str(caught.value)
    assert text.startswith(f"{servers[2].url} serves stories (from /models/stories, 32 tokens of context), but ")
    assert "start all servers with the same model" in text


def test_open_refuses_servers_that_compute_differently(fakes, client):
    servers = fakes(None, None, None)
    servers[0].skew = 0.3
    with pytest.raises(EngineError) as caught:
        client(servers)
    text = str(caught.value)
    assert f"{servers[0].url}: gives other logprobs than {servers[1].url} (off by 0.3 nats); start all" in text


def test_open_with_a_shorter_context(fakes, client):
    (fake,) = fakes(None)
    one = client([fake], max_model_len=20)
    assert one.max_model_len == 20
    assert len(one.generate([[1] * 15], GREEDY)[0][0].token_ids) == 5
    with pytest.raises(RequestError, match="the context holds 20"):
        one.generate([[1] * 20], GREEDY)
    with pytest.raises(EngineError, match="max_model_len 65 is more than the 64 tokens of context at"):
        client([fake], max_model_len=65)
    with pytest.raises(UsageError, match="max_model_len 0: expected at least 1"):
        client([fake], max_model_len=0)


def test_open_takes_the_key_from_the_environment(fakes, client, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for given, variable, sent in [(None, None, None), (None, "k1", "Bearer k1"), ("k2", "k1", "Bearer k2")]:
        if variable:
            monkeypatch.setenv("VLLM_API_KEY", variable)
        (fake,) = fakes(None)
        ask(client([fake], api_key=given), 1)
        assert fake.keys == {sent}


def test_open_refuses_what_cannot_be_used(fakes, client, stories_dir):
    (fake,) = fakes(None)
    with pytest.raises(UsageError, match="expected the URL of a server"):
        ServerEngine(str(stories_dir), ["localhost:8000"])
    with pytest.raises(UsageError, match="each server once"):
        ServerEngine(str(stories_dir), [fake.url, fake.url + "/v1"])
    with pytest.raises(UsageError, match="at least one server"):
        ServerEngine(str(stories_dir), [])
    fake.processed = True
    with pytest.raises(EngineError, match=r"logprobs after temperature and filters .* without --logprobs-mode"):
        client([fake])
    fake.processed, fake.tokenizer = False, type("T", (), {"encode": lambda *a, **k: [5]})
    with pytest.raises(EngineError, match="another tokenizer"):
        client([fake])
    fake.stop()
    with pytest.raises(EngineError) as caught:
        client([fake])
    assert f"{fake.url} cannot be used: ConnectError" in str(caught.value)
    assert "llmrl serve" in str(caught.value)
