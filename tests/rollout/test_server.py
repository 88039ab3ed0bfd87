"""The client of several servers against servers that fail in every way; each future settles once, nothing is lost."""

import threading
import time

import pytest
from fake_vllm import LENGTH, logprob
from server_support import GREEDY, ask, expected, on_completion, prompts, right, wait_for

from llmrl.errors import EngineError, RequestError
from llmrl.rollout import http, server_pool
from llmrl.types import FinishReason, SamplingConfig

# one request


def test_generate_sends_every_setting_and_reads_the_answer(fakes, client):
    (fake,) = fakes(None)
    one = client([fake])
    sampling = SamplingConfig(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, max_tokens=6, n=3, stop=("x",), stop_token_ids=(9,), seed=4,
        logprobs=2, json_schema={"type": "object"},
    )  # fmt: skip
    rows = one.generate([[1, 2, 3]], sampling)[0]
    bodies = fake.completions()
    assert len(bodies) == len(rows) == 3
    body = next(body for body in bodies if body["seed"] == 4)
    wanted = {
        "model": "stories", "prompt": [1, 2, 3], "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "max_tokens": 6, "stop": ["x"], "stop_token_ids": [1, 2, 9], "ignore_eos": True, "logprobs": 2, "seed": 4,
        "structured_outputs": {"json": {"type": "object"}}, "return_token_ids": True, "repetition_penalty": 1.0,
        "return_tokens_as_token_ids": True, "skip_special_tokens": True, "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }  # fmt: skip
    assert body == wanted
    assert len({body["seed"] for body in bodies}) == 3
    first = rows[0]
    assert first.token_ids == expected([1, 2, 3], 4, count=6)
    context = [1, 2, 3]
    for token, found, top in zip(first.token_ids, first.logprobs, first.top_logprobs, strict=True):
        assert found == pytest.approx(logprob(context, token))
        assert len(top) == 2
        assert top[0] == (4, -0.001)
        context.append(token)
    assert first.text == one.tokenizer.decode(first.token_ids, skip_special_tokens=True)
    assert first.policy_version == one.version
    assert first.finish_reason == FinishReason.LENGTH
    assert one.max_model_len == 64


def test_score_and_refusals_that_are_not_sent(fakes, client):
    (fake,) = fakes(None)
    one = client([fake])
    ids = [1, 50, 60, 70]
    assert one.score(ids) == pytest.approx([logprob(ids[:i], ids[i]) for i in (1, 2, 3)])
    fake.seen.clear()
    with pytest.raises(RequestError, match="the prompt has 64 tokens and the context holds 64"):
        one.generate([[1] * 64], GREEDY)
    with pytest.raises(RequestError, match="cannot score 64 tokens"):
        one.score([1] * 64)
    with pytest.raises(RequestError, match="token id 512 is not in the vocabulary"):
        one.generate([[512]], GREEDY)
    assert fake.seen == []


def test_request_the_server_refuses_is_not_retried(fakes, client):
    a, b = fakes((400, "logprobs of 50\nare too many"), (400, "logprobs of 50\nare too many"))
    one = client([a, b])
    with pytest.raises(RequestError) as caught:
        one.generate([[1, 2]], GREEDY)
    assert "refused the request (400): logprobs of 50 are too many" in str(caught.value)
    assert len(a.completions()) + len(b.completions()) == 1
    a.fault = b.fault = lambda path, body: None
    assert ask(one, 4)


# a server that fails: the other one answers everything

FAULTS = {
    "error 500": ((500, "out of memory"), "500 out of memory"),
    "garbage": ("garbage", "not JSON"),
    "empty": ("empty", "something that is no completion"),
    "cut": ("cut", "RemoteProtocolError"),
    "reset": ("reset", "Error"),
    "other prompt": (lambda choice: choice.update(prompt_token_ids=[9]), "answered to another prompt: [9]"),
    "no ids": (lambda choice: choice.update(prompt_token_ids=None), "returns no token ids"),
    "no tokens": (lambda choice: choice.update(token_ids=[]), "answered with 0 tokens"),
    "too many": (lambda choice: choice.update(token_ids=[3] * 99), "answered with 99 tokens"),
    "strange id": (lambda choice: choice["token_ids"].__setitem__(1, 512), "token id 512, the vocabulary has 512"),
    "few logprobs": (lambda choice: choice["logprobs"]["token_logprobs"].pop(), "7 logprobs, expected 8"),
    "no logprobs": (lambda choice: choice.update(logprobs=None), "without logprobs"),
    "logit": (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, 7.5), "the logprob 7.5"),
    "null": (lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, None), "the logprob None"),
    "abort": (lambda choice: choice.update(finish_reason="abort"), "finish_reason 'abort'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_request_goes_to_another_server(name, fakes, client):
    fault, words = FAULTS[name]
    bad, good = fakes(None, None)
    bad.later = on_completion(fault)
    one = client([bad, good])
    samples = ask(one)
    assert [sample.token_ids for sample in samples] == right()
    # every request was answered well once, with its own seed; none was sent to the good server twice
    assert sorted(body["seed"] for body in good.completions()) == list(range(40))
    assert words in one._pool.members[0].error
    # and alone, the bad one fails each request by name
    good.stop()
    with pytest.raises(EngineError) as caught:
        one.generate([[1, 2]], GREEDY)
    assert words in str(caught.value)
    assert "finished work is kept, and the same command goes on" in str(caught.value)


def with_timeout(one, seconds):
    """Short from now on: opening took its time."""
    for member in one._pool.members:
        member.http._timeout = seconds
    return one


def test_hanging_server_times_out(fakes, client, monkeypatch):
    monkeypatch.setattr(http, "HEALTH_TIMEOUT", 0.5)
    bad, good = fakes(None, None)
    bad.later = lambda path, body: "hang" if path in ("/v1/completions", "/health") else None
    one = with_timeout(client([bad, good]), 1.5)
    assert [sample.token_ids for sample in ask(one, 8)] == right(8)
    assert "no answer in 1.5 s, and it is not healthy (no answer in 0.5 s)" in one._pool.members[0].error


def test_server_that_leaves_one_request_and_is_healthy_is_given_up_at_last(fakes, client):
    bad, good = fakes("hang", None)
    one = with_timeout(client([bad, good]), 0.2)
    assert [sample.token_ids for sample in ask(one, 8)] == right(8)
    assert "no answer in 2 s, although it is healthy" in one._pool.members[0].error
    assert bad.paths().count("/health") >= 10


def test_healthy_server_with_a_queue_is_waited_for(fakes, client):
    """Twenty requests, two at a time: the last waits for five timeouts."""
    (fake,) = fakes(None)
    one = with_timeout(client([fake]), 0.3)
    slots, answer = threading.Semaphore(2), fake.answer

    def queued(method, path, body):
        if path == "/v1/completions":
            with slots:
                time.sleep(0.15)
        return answer(method, path, body)

    fake.answer = queued
    assert [sample.token_ids for sample in ask(one, 20)] == right(20)
    assert sorted(body["seed"] for body in fake.completions()) == list(range(20))  # each was sent once
    assert "/health" in fake.paths()
    assert one._pool.members[0].faults == 0


def test_only_so_many_requests_are_under_way_at_a_server(fakes, client, monkeypatch):
    monkeypatch.setattr(server_pool, "_IN_FLIGHT", 4)
    servers = fakes("slow", "slow")
    one = client(servers)
    for fake in servers:
        fake.peak = 0
    assert [sample.token_ids for sample in ask(one, 40)] == right(40)
    assert [fake.peak for fake in servers] == [4, 4]


def nan_in(row):
    """Answers as an HTTP server that writes NaN does."""
    return lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(row, float("nan"))


@pytest.mark.parametrize(
    "fault", [nan_in(0), nan_in(5), (400, "Out of range float values are not JSON compliant: nan")]
)
def test_model_that_gives_nan_fails_that_prompt_only(fault, fakes, client):
    servers = fakes(None, None)
    for fake in servers:
        fake.later = lambda path, body: fault if path == "/v1/completions" and body.get("seed") == 3 else None
    one = client(servers)
    futures = [one.submit(p, SamplingConfig(max_tokens=LENGTH, seed=i)) for i, p in enumerate(prompts(8))]
    for i, future in enumerate(futures):
        if i == 3:
            with pytest.raises(RequestError, match="the model gave a logprob that is not a number for this prompt"):
                future.result(10)
        else:
            assert future.result(10)[0].token_ids == right(8)[i]
    assert [body["seed"] for fake in servers for body in fake.completions()].count(3) == 1
    assert all(member.up for member in one._pool.members)


# one server among several


def test_each_asks_one_server_and_no_other(fakes, client):
    a, b = fakes(None, None)
    one = client([a, b])
    assert one.is_shared
    views = one.each()
    assert [view.name for view in views] == [a.url, b.url]
    ids = [1, 50, 60, 70]
    b.skew = 1.0
    for view, skew in zip(views, (0.0, 1.0), strict=True):
        assert view.score(ids) == pytest.approx([logprob(ids[:i], ids[i]) - skew for i in (1, 2, 3)])
        assert view.generate([1, 2], GREEDY).token_ids == expected([1, 2], 7)
    assert (len(a.completions()), len(b.completions())) == (2, 2)
    b.fault = on_completion((500, "no memory"))
    with pytest.raises(EngineError, match=f"{b.url}: 500 no memory"):
        views[1].score(ids)
    with pytest.raises(EngineError, match=f"{b.url}: 500 no memory"):  # it is out
        views[1].generate([1, 2], GREEDY)
    assert len(a.completions()) == 2
    assert [view.name for view in one.each()] == [a.url]
    with pytest.raises(RequestError, match="not in the vocabulary"):
        views[0].score([1, 512])
    a.stop()
    with pytest.raises(EngineError, match=a.url):
        views[0].score(ids)
    with pytest.raises(EngineError, match="no server answers"):
        one.each()


def test_busy_servers_are_asked_again(fakes, client):
    (fake,) = fakes(None)
    count = iter(range(100))
    fake.later = lambda path, body: (429, "slow down") if path == "/v1/completions" and next(count) < 3 else None
    one = client([fake])
    assert ask(one, 1)[0].token_ids == right(1)[0]
    assert len(fake.completions()) == 4
    assert one._pool.members[0].up
    fake.fault = on_completion((503, "still loading"))
    one._pool.timeout = 0.5
    with pytest.raises(EngineError, match=r"too busy for 0.5 s \(503 still loading\)"):
        one.generate([[1, 2]], GREEDY)


def test_one_request_survives_only_so_many_failures(fakes, client):
    servers = fakes(*[(500, "poison")] * 3)
    one = client(servers, retries=2, patience=10)
    with pytest.raises(EngineError, match=r"3 servers in a row failed on one request.*500 poison"):
        one.generate([[1, 2]], GREEDY)
    assert sum(len(fake.completions()) for fake in servers) == 3


def test_server_dies_under_load_and_nothing_is_lost_or_doubled(fakes, client):
    bad, good = fakes(None, None)
    count = iter(range(10_000))
    bad.later = lambda path, body: None if path != "/v1/completions" else "die" if next(count) == 20 else "slow"
    good.later = on_completion("slow")
    one = client([bad, good])
    futures = [one.submit(p, SamplingConfig(max_tokens=LENGTH, seed=i)) for i, p in enumerate(prompts(200))]
    settled = []
    for i, future in enumerate(futures):
        future.add_done_callback(lambda f, i=i: settled.append(i))
    assert [future.result(timeout=30)[0].token_ids for future in futures] == right(200)
    assert sorted(settled) == list(range(200))
    # then the other one: what is finished stays, what is new says which servers failed and how
    good.stop()
    start = time.monotonic()
    with pytest.raises(EngineError) as caught:
        one.generate([[1, 2]], GREEDY)
    assert time.monotonic() - start < 10
    for fake in (bad, good):
        assert fake.url + ": " in str(caught.value)
    assert futures[0].result()[0].token_ids == right(1)[0]


def test_server_comes_back_when_healthy(fakes, client):
    bad, good = fakes(None, None)
    broken = True
    bad.later = lambda path, body: (500, "no") if broken and path in ("/v1/completions", "/health") else None
    one = client([bad, good])
    ask(one, 4)
    bad.seen.clear()
    ask(one, 10)
    assert not bad.completions()
    broken = False
    wait_for(lambda: one._pool.members[0].up)
    good.fault = on_completion("slow")
    assert [sample.token_ids for sample in ask(one, 10)] == right(10)
    assert bad.completions()


def test_restarted_server_with_another_model_stays_out(fakes, client):
    bad, good = fakes(None, None)
    bad.later = lambda path, body: (404, "The model does not exist") if path == "/v1/completions" else None
    one = client([bad, good])
    bad.name = "other"
    assert [sample.token_ids for sample in ask(one, 6)] == right(6)
    wait_for(lambda: "now serves other" in one._pool.members[0].error)
    assert not one._pool.members[0].up


def test_server_that_cannot_be_taken_back_is_tried_again(fakes, client):
    """Whatever goes wrong, the server is not forgotten."""
    bad, good = fakes(None, None)
    one = client([bad, good])
    revive, errors = one._pool._revive, iter([OSError("no space left"), ZeroDivisionError()])

    async def failing(member):
        for error in errors:
            raise error
        await revive(member)

    one._pool._revive = failing
    bad.fault = lambda path, body: (500, "once") if path == "/v1/completions" else None
    ask(one, 4)
    bad.fault = lambda path, body: None
    member = one._pool.members[0]
    wait_for(lambda: "500 once; not taken back: OSError: no space left" in member.error)
    wait_for(lambda: member.up)
    assert [sample.token_ids for sample in ask(one, 10)] == right(10)


def test_load_is_spread_and_hundreds_wait(fakes, client):
    servers = fakes("slow", "slow", "slow")
    one = client(servers)
    assert [sample.token_ids for sample in ask(one, 300)] == right(300)
    shares = [len(fake.completions()) for fake in servers]
    assert sum(shares) == 300
    assert min(shares) >= 80
    assert min(fake.peak for fake in servers) > 2  # one after the other would be 1; 6 were seen on a very busy machine


def test_cancel_closes_the_connection(fakes, client):
    (fake,) = fakes("hang")
    one = client([fake])
    future = one.submit([1, 2], GREEDY)
    wait_for(lambda: fake.completions())
    assert future.cancel()
    assert fake.closed_early.wait(5)
    assert one._pool.members[0].up


def test_close_fails_what_is_under_way(fakes, client):
    (fake,) = fakes("hang")
    one = client([fake])
    futures = [one.submit([1, 2], GREEDY) for _ in range(5)]
    wait_for(lambda: len(fake.completions()) == 5)
    one.close()
    for future in [*futures, one.submit([1, 2], GREEDY)]:
        with pytest.raises(EngineError, match="the engine was closed"):
            future.result(timeout=5)


@pytest.fixture
def breaks_once(monkeypatch):
    """The first request finds its connection closed; returns what was asked, and whether on a connection of its own."""
    from llmrl.rollout.http import HttpServer, LostConnection

    asked, plain = [], HttpServer._ask

    async def ask(self, method, path, body, timeout, client=None):
        asked.append((method, path, client is not None))
        if len(asked) == 1:
            raise LostConnection("ReadError: connection lost")
        return await plain(self, method, path, body, timeout, client)

    monkeypatch.setattr(HttpServer, "_ask", ask)
    return asked


def test_a_state_is_asked_for_again_when_the_connection_was_just_closed(fakes, client, breaks_once):
    one = client(fakes(None))
    breaks_once.clear()
    found = one._loop.run(one._pool.members[0].http.get("/v1/models"))
    assert found["data"]
    assert breaks_once == [("GET", "/v1/models", False), ("GET", "/v1/models", True)]


def test_a_completion_is_asked_for_again_and_its_server_stays_in(fakes, client, breaks_once):
    (fake,) = fakes(None)
    one = client([fake])
    breaks_once.clear()
    assert one.generate([[1, 2]], GREEDY)[0][0].token_ids
    assert breaks_once[:2] == [("POST", "/v1/completions", False), ("POST", "/v1/completions", True)]
    assert one._pool.members[0].faults == 0


def test_a_change_is_not_asked_for_twice(fakes, client, breaks_once):
    from llmrl.rollout.http import LostConnection

    one = client(fakes(None))
    breaks_once.clear()
    with pytest.raises(LostConnection):
        one._loop.run(one._pool.members[0].http.post("/pause?mode=wait"))
    assert len(breaks_once) == 1
