"""The client of several servers against servers that fail in every way; each future settles once, nothing is lost."""

import functools
import json
import threading
import time

import pytest
import torch
from fake_vllm import LENGTH, FakeVllm, logprob, next_token

from llmrl.errors import EngineError, ModelError, RequestError, SyncError, UsageError
from llmrl.rollout import server
from llmrl.rollout.server import ServerEngine
from llmrl.types import FinishReason, SamplingConfig

read_facts = functools.cache(server.read_facts)  # one model for all tests
WEIGHTS = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.ones(4)}
GREEDY = SamplingConfig(temperature=0, max_tokens=LENGTH, seed=7)


@pytest.fixture
def fakes(stories_tokenizer):
    """Return `fakes(*faults, ...)`: one fake server a fault (None: a good one), stopped at the end."""
    started = []

    def start(*faults, **options):
        new = [FakeVllm(stories_tokenizer, **options) for _ in faults]
        started.extend(new)
        for fake, fault in zip(new, faults, strict=True):
            fake.later = on_completion(fault)
        return new

    start.more = started.append
    yield start
    for fake in started:
        if not fake.stopping.is_set():
            fake.stop()


def on_completion(fault):
    return lambda path, body: fault if path == "/v1/completions" else None


@pytest.fixture
def engine(stories_dir, tmp_path, monkeypatch):
    """Return `engine(fakes, ...)`: opened while all servers are well; their faults begin after that."""
    opened = []
    monkeypatch.setattr(server, "read_facts", read_facts)

    def open_on(servers, **options):
        options = {"retries": 3, "patience": 0.6, "timeout": 20.0, "transfer_dir": tmp_path} | options
        new = ServerEngine(str(stories_dir), [fake.url for fake in servers], **options)
        opened.append(new)
        for fake in servers:
            fake.seen.clear()
            fake.fault = fake.later
        return new

    yield open_on
    for one in opened:
        one.close()


def expected(prompt, seed, weights="start", count=LENGTH):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, seed, weights))
    return tuple(ids[len(prompt) :])


def prompts(count):
    return [[1, 300 + i % 100, 7, i % 50 + 3] for i in range(count)]


def ask(one, count=40, **sampling):
    """Return the samples of many prompts at once, each with a seed of its own, checked against what is right."""
    configs = [
        SamplingConfig(**({"temperature": 1.0, "max_tokens": LENGTH, "seed": i} | sampling)) for i in range(count)
    ]
    rows = one.generate(prompts(count), configs)
    return [row[0] for row in rows]


def right(count=40, weights="start"):
    return [expected(prompt, i, weights) for i, prompt in enumerate(prompts(count))]


# one request


def test_generate_sends_every_setting_and_reads_the_answer(fakes, engine):
    (fake,) = fakes(None)
    one = engine([fake])
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


def test_score_and_refusals_that_are_not_sent(fakes, engine):
    (fake,) = fakes(None)
    one = engine([fake])
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


def test_request_the_server_refuses_is_not_retried(fakes, engine):
    a, b = fakes((400, "logprobs of 50\nare too many"), (400, "logprobs of 50\nare too many"))
    one = engine([a, b])
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
def test_request_goes_to_another_server(name, fakes, engine):
    fault, words = FAULTS[name]
    bad, good = fakes(None, None)
    bad.later = on_completion(fault)
    one = engine([bad, good])
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


def test_hanging_server_times_out(fakes, engine):
    bad, good = fakes("hang", None)
    one = engine([bad, good])
    for member in one._pool.members:
        member.http._timeout = 1.5
    assert [sample.token_ids for sample in ask(one, 8)] == right(8)
    assert "no answer in 1.5 s" in one._pool.members[0].error


def test_busy_servers_are_asked_again(fakes, engine):
    (fake,) = fakes(None)
    count = iter(range(100))
    fake.later = lambda path, body: (429, "slow down") if path == "/v1/completions" and next(count) < 3 else None
    one = engine([fake])
    assert ask(one, 1)[0].token_ids == right(1)[0]
    assert len(fake.completions()) == 4
    assert one._pool.members[0].up
    fake.fault = on_completion((503, "still loading"))
    one._pool.timeout = 0.5
    with pytest.raises(EngineError, match=r"too busy for 0.5 s \(503 still loading\)"):
        one.generate([[1, 2]], GREEDY)


def test_one_request_survives_only_so_many_failures(fakes, engine):
    servers = fakes(*[(500, "poison")] * 3)
    one = engine(servers, retries=2, patience=10)
    with pytest.raises(EngineError, match=r"3 servers in a row failed on one request.*500 poison"):
        one.generate([[1, 2]], GREEDY)
    assert sum(len(fake.completions()) for fake in servers) == 3


def test_server_dies_under_load_and_nothing_is_lost_or_doubled(fakes, engine):
    bad, good = fakes(None, None)
    count = iter(range(10_000))
    bad.later = lambda path, body: None if path != "/v1/completions" else "die" if next(count) == 20 else "slow"
    good.later = on_completion("slow")
    one = engine([bad, good])
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


def test_server_comes_back_when_healthy(fakes, engine):
    bad, good = fakes(None, None)
    broken = True
    bad.later = lambda path, body: (500, "no") if broken and path in ("/v1/completions", "/health") else None
    one = engine([bad, good])
    ask(one, 4)
    bad.seen.clear()
    ask(one, 10)
    assert not bad.completions()
    broken = False
    wait_for(lambda: one._pool.members[0].up)
    good.fault = on_completion("slow")
    assert [sample.token_ids for sample in ask(one, 10)] == right(10)
    assert bad.completions()


def test_restarted_server_with_another_model_stays_out(fakes, engine):
    bad, good = fakes(None, None)
    bad.later = lambda path, body: (404, "The model does not exist") if path == "/v1/completions" else None
    one = engine([bad, good])
    bad.name = "other"
    assert [sample.token_ids for sample in ask(one, 6)] == right(6)
    wait_for(lambda: "now serves other" in one._pool.members[0].error)
    assert not one._pool.members[0].up


def test_load_is_spread_and_hundreds_wait(fakes, engine):
    servers = fakes("slow", "slow", "slow")
    one = engine(servers)
    assert [sample.token_ids for sample in ask(one, 300)] == right(300)
    shares = [len(fake.completions()) for fake in servers]
    assert sum(shares) == 300
    assert min(shares) >= 80
    assert min(fake.peak for fake in servers) > 20


def test_cancel_closes_the_connection(fakes, engine):
    (fake,) = fakes("hang")
    one = engine([fake])
    future = one.submit([1, 2], GREEDY)
    wait_for(lambda: fake.completions())
    assert future.cancel()
    assert fake.closed_early.wait(5)
    assert one._pool.members[0].up


def test_close_fails_what_is_under_way(fakes, engine):
    (fake,) = fakes("hang")
    one = engine([fake])
    futures = [one.submit([1, 2], GREEDY) for _ in range(5)]
    wait_for(lambda: len(fake.completions()) == 5)
    one.close()
    for future in [*futures, one.submit([1, 2], GREEDY)]:
        with pytest.raises(EngineError, match="the engine was closed"):
            future.result(timeout=5)


# opening


def test_open_names_the_server_that_is_odd(fakes, engine):
    servers = fakes(None, None) + fakes(None, length=32)
    with pytest.raises(EngineError) as caught:
        engine(servers)
    text = str(caught.value)
    assert text.startswith(f"{servers[2].url} serves stories (from /models/stories, 32 tokens of context), but ")
    assert "start all servers with the same model" in text


def test_open_refuses_what_cannot_be_used(fakes, engine, stories_dir):
    (fake,) = fakes(None)
    with pytest.raises(UsageError, match="expected the URL of a server"):
        ServerEngine(str(stories_dir), ["localhost:8000"])
    with pytest.raises(UsageError, match="each server once"):
        ServerEngine(str(stories_dir), [fake.url, fake.url + "/v1"])
    with pytest.raises(UsageError, match="at least one server"):
        ServerEngine(str(stories_dir), [])
    fake.processed = True
    with pytest.raises(EngineError, match=r"logprobs after temperature and filters .* without --logprobs-mode"):
        engine([fake])
    fake.processed, fake.tokenizer = False, type("T", (), {"encode": lambda *a, **k: [5]})
    with pytest.raises(EngineError, match="another tokenizer"):
        engine([fake])
    fake.stop()
    with pytest.raises(EngineError) as caught:
        engine([fake])
    assert f"{fake.url} cannot be used: ConnectError" in str(caught.value)
    assert "llmrl serve" in str(caught.value)


# new weights


def test_update_reaches_all_servers(fakes, engine, tmp_path):
    servers = fakes(None, None)
    one = engine(servers, require_sync=True)
    version = one.update(WEIGHTS)
    assert version.number == 1
    assert one.version == version
    for fake in servers:
        assert fake.weights == version.fingerprint
        assert fake.label == f"1-{version.fingerprint}"
        assert not fake.paused
        paths = [path for path in fake.paths() if path != "/weight_info"]
        order = ["/update_weights", "/pause?mode=wait", "/update_weights", "/reset_prefix_cache", "/resume"]
        found = iter(paths)
        assert all(path in found for path in order), paths
    samples = ask(one)
    assert [sample.token_ids for sample in samples] == right(weights=version.fingerprint)
    assert {sample.policy_version for sample in samples} == {version}
    second = one.update({"one": WEIGHTS["one"] + 1, "two": WEIGHTS["two"]})
    assert second.number == 2
    assert [path.name for folder in tmp_path.iterdir() for path in folder.iterdir()] == ["version-2"]
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_update_waits_for_what_is_under_way_and_the_next_waits_for_it(fakes, engine):
    servers = fakes("slow", "slow")
    one = engine(servers)
    before = [one.submit(p, SamplingConfig(max_tokens=LENGTH, seed=i)) for i, p in enumerate(prompts(30))]
    version = one.update(WEIGHTS)
    assert all(future.done() for future in before)
    assert [future.result()[0].token_ids for future in before] == right(30)
    assert {future.result()[0].policy_version.number for future in before} == {0}
    assert [sample.token_ids for sample in ask(one, 5)] == right(5, version.fingerprint)


def test_update_refused_while_staging_touches_no_server(fakes, engine):
    a, b = fakes(None, None)
    one = engine([a, b])
    message = "Call to collective_rpc method failed: Worker failed with error 'corrupted on the way: x.weight', please check the stack trace above"  # noqa: E501
    b.fault = lambda path, body: (500, message) if path == "/update_weights" else None
    with pytest.raises(SyncError) as caught:
        one.update(WEIGHTS)
    assert f"{b.url} did not take the update: 500 corrupted on the way: x.weight; no server has taken" in str(
        caught.value
    )
    assert (a.weights, b.weights, a.label, b.label) == ("start", "start", "default", "default")
    assert one.version.number == 0
    assert [sample.token_ids for sample in ask(one)] == right()
    assert a.completions()
    assert b.completions()


@pytest.mark.parametrize("path", ["/update_weights", "/finish_weight_update", "/reset_prefix_cache"])
@pytest.mark.parametrize("earlier", [0, 1])
def test_update_that_breaks_off_on_one_server_is_taken_back_on_the_others(path, earlier, fakes, engine, stories_dir):
    a, b, c = fakes(None, None, None)
    one = engine([a, b, c])
    for _ in range(earlier):
        one.update(WEIGHTS)
    before, old = one.version, a.weights

    def break_off(asked, body):
        staged = asked == "/update_weights" and body["update_info"].get("stage")
        committing = b.label.startswith("loading")
        return (500, "no memory left") if asked == path and committing and not staged else None

    b.fault = break_off
    with pytest.raises(SyncError) as caught:
        one.update({"one": WEIGHTS["one"] + 1, "two": WEIGHTS["two"]})
    assert f"{b.url} did not take the update: 500 no memory left; restart {b.url}; the others are back" in str(
        caught.value
    )
    assert one.version == before
    b.fault = lambda path, body: None
    b.seen.clear()
    now = old if earlier else a.weights  # start weights are written again from the model's folder
    assert a.weights == c.weights == now
    assert a.label == c.label == (f"1-{before.fingerprint}" if earlier else "default")
    assert [sample.token_ids for sample in ask(one)] == right(weights=now)
    time.sleep(0.6)  # it is healthy again, but nobody knows what it holds
    ask(one)
    assert not b.completions()
    assert "restart it" in one._pool.report()
    # the update after it goes to those that are left
    assert one.update(WEIGHTS | {"two": torch.zeros(4)}).number == before.number + 1
    assert {sample.policy_version.number for sample in ask(one)} == {before.number + 1}


def test_restarted_server_is_never_sampled_from_with_its_start_weights(fakes, engine):
    a, b = fakes(None, None)
    one = engine([a, b])
    version = one.update(WEIGHTS)
    a.stop()  # between two requests: nobody has noticed yet
    again = a.restarted()
    fakes.more(again)
    again.fault = lambda path, body: (500, "not yet") if path == "/pause?mode=wait" else None
    assert [sample.token_ids for sample in ask(one)] == right(weights=version.fingerprint)
    assert again.completions()  # it was asked, and its answers were not believed
    assert "not yet" in one._pool.report() or "start weights" in one._pool.report()
    again.label = "default"
    again.fault = lambda path, body: None
    wait_for(lambda: not one._pool.report(), 20)
    assert again.weights == version.fingerprint
    b.stop()
    assert [sample.token_ids for sample in ask(one)] == right(weights=version.fingerprint)


def test_answer_begun_before_a_server_was_brought_back_is_not_believed(fakes, engine):
    """The label is right when it is asked for, but the answer was sampled before the weights were."""
    a, b = fakes(None, None)
    one = engine([a, b])
    version = one.update(WEIGHTS)
    a.weights, a.label = "start", "default"  # as after a restart
    a.seen.clear()
    held = threading.Event()
    a.fault = lambda path, body: (held.wait(10), None)[1] if path == "/weight_info" and not body else None
    waiting = [one.submit(p, SamplingConfig(max_tokens=LENGTH, seed=i)) for i, p in enumerate(prompts(6))]
    wait_for(lambda: a.paths().count("/weight_info") == 3)  # half of the answers, sampled and not yet believed
    one._pool.members[0].epoch += 1  # what bringing it back does
    a.weights, a.label = version.fingerprint, f"1-{version.fingerprint}"
    held.set()
    assert [future.result(10)[0].token_ids for future in waiting] == right(6, version.fingerprint)


def test_server_without_updates_is_refused_with_the_command(fakes, engine):
    (fake,) = fakes(None, sync=False)
    one = engine([fake])
    assert ask(one, 2)
    with pytest.raises(EngineError) as caught:
        one.update(WEIGHTS)
    text = str(caught.value)
    assert f"{fake.url} takes no new weights" in text
    assert "llmrl serve /models/stories --sync" in text
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve /models/stories --weight-transfer-config '" in text
    assert json.loads(text.split("'")[1]) == {"backend": "llmrl_file"}
    assert ask(one, 2)
    with pytest.raises(EngineError, match="takes no new weights"):
        engine([fake], require_sync=True)


def test_weights_an_earlier_run_left_are_taken_back(fakes, engine):
    a, b = fakes(None, None)
    a.weights, a.label = "trained", "3-abc"
    b.paused = True
    one = engine([a, b])
    assert a.label == "default"
    assert a.weights != "trained"
    assert not b.paused
    one.close()
    a.label = "loading-4-abc"
    with pytest.raises(EngineError, match="left a mixture of weights: restart it"):
        engine([a, b])


# adapters


def adapter(folder, scale):
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {name + "A.weight": torch.ones(2, 64) * scale, name + "B.weight": torch.ones(256, 2)},
        folder / "adapter_model.safetensors",
    )
    return folder


def test_adapter_takes_the_place_of_the_one_before(fakes, engine, tmp_path):
    (tmp_path / "a").mkdir()
    servers = fakes(None, None)
    one = engine(servers, adapter=adapter(tmp_path / "a" / "first", 1.0))
    names = [list(fake.adapters) for fake in servers]
    assert names[0] == names[1]
    assert len(names[0]) == 1
    first = one.version
    assert first.number == 1
    samples = ask(one, 6)
    assert [sample.token_ids for sample in samples] == right(6, "version-1")
    # the base is asked by its own name, and is another version
    base = one.generate([[1, 2, 3]], GREEDY, base=True)[0][0]
    assert base.token_ids == expected([1, 2, 3], 7)
    assert base.policy_version.number == 0
    second = one.update(adapter(tmp_path / "a" / "second", 2.0))
    assert second.number == 2
    assert second.fingerprint != first.fingerprint
    assert [len(fake.adapters) for fake in servers] == [1, 1]
    assert list(servers[0].adapters) != names[0]
    # one that fails on one server is used by none
    servers[1].fault = lambda path, body: (500, "rank 64 is too high") if path == "/v1/load_lora_adapter" else None
    with pytest.raises(
        SyncError, match=f"{servers[1].url} did not take the update: 500 rank 64 is too high; no server"
    ):
        one.update(adapter(tmp_path / "a" / "third", 3.0))
    assert [len(fake.adapters) for fake in servers] == [1, 1]
    assert one.version == second
    assert {sample.token_ids for sample in ask(one, 6)} == set(right(6, "version-2"))
    with pytest.raises(EngineError, match="samples with an adapter"):
        one.update(WEIGHTS)
    with pytest.raises(ModelError, match="has no adapter_config"):
        one.update(tmp_path)


def test_server_that_forgot_the_adapter_gets_it_again(fakes, engine, tmp_path):
    (tmp_path / "a").mkdir()
    servers = fakes(None, None)
    one = engine(servers, adapter=adapter(tmp_path / "a" / "first", 1.0))
    servers[0].adapters.clear()  # as after a restart: the request is answered with 404
    assert [sample.token_ids for sample in ask(one)] == right(weights="version-1")
    wait_for(lambda: servers[0].adapters)
    wait_for(lambda: one._pool.members[0].up)
    assert [sample.token_ids for sample in ask(one)] == right(weights="version-1")


def test_adapter_on_server_without_means_is_refused(fakes, engine, tmp_path):
    (fake,) = fakes((404, "Not Found"))
    fake.later = lambda path, body: (404, "Not Found") if path == "/v1/load_lora_adapter" else None
    one = engine([fake])
    (tmp_path / "a").mkdir()
    with pytest.raises(EngineError) as caught:
        one.update(adapter(tmp_path / "a" / "first", 1.0))
    assert "llmrl serve /models/stories --sync --enable-lora" in str(caught.value)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve /models/stories --enable-lora" in str(caught.value)


def wait_for(condition, seconds=8):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
