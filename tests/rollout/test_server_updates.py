"""New weights and adapters on several servers: all of them or none, and no answer from others than were asked for."""

import json
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from fake_vllm import LENGTH
from server_support import GREEDY, WEIGHTS, ask, expected, prompts, right, wait_for

from llmrl.errors import EngineError, ModelError, SyncError
from llmrl.types import SamplingConfig

# new weights


def test_update_reaches_all_servers(fakes, client, tmp_path):
    servers = fakes(None, None)
    one = client(servers, require_sync=True)
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


def test_update_waits_for_what_is_under_way_and_the_next_waits_for_it(fakes, client):
    servers = fakes("slow", "slow")
    one = client(servers)
    before = [one.submit(p, SamplingConfig(max_tokens=LENGTH, seed=i)) for i, p in enumerate(prompts(30))]
    version = one.update(WEIGHTS)
    assert all(future.done() for future in before)
    assert [future.result()[0].token_ids for future in before] == right(30)
    assert {future.result()[0].policy_version.number for future in before} == {0}
    assert [sample.token_ids for sample in ask(one, 5)] == right(5, version.fingerprint)


def test_update_refused_while_staging_touches_no_server(fakes, client):
    a, b = fakes(None, None)
    one = client([a, b])
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
def test_update_that_breaks_off_on_one_server_is_taken_back_on_the_others(path, earlier, fakes, client, stories_dir):
    a, b, c = fakes(None, None, None)
    one = client([a, b, c])
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


def test_restarted_server_is_never_sampled_from_with_its_start_weights(fakes, client):
    a, b = fakes(None, None)
    one = client([a, b])
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


def test_answer_begun_before_a_server_was_brought_back_is_not_believed(fakes, client):
    """The label is right when it is asked for, but the answer was sampled before the weights were."""
    a, b = fakes(None, None)
    one = client([a, b])
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


@pytest.mark.parametrize("interrupted", [False, True])
def test_close_waits_for_an_update_that_has_begun(interrupted, fakes, client):
    (fake,) = fakes(None)
    one = client([fake])
    loading, answer, results = threading.Event(), fake.answer, []

    def slow(method, path, body):
        if path == "/update_weights" and not body["update_info"].get("stage"):
            loading.set()
            time.sleep(1.0)
        return answer(method, path, body)

    fake.answer = slow
    if interrupted:  # Ctrl-C comes while the caller waits
        submit = one._loop.submit

        def interrupt(work):
            future = submit(work)
            future.result = lambda: loading.wait(10) and (_ for _ in ()).throw(KeyboardInterrupt)
            return future

        one._loop.submit = interrupt
        with pytest.raises(KeyboardInterrupt):
            one.update(WEIGHTS)
        one._loop.submit = submit
    else:
        thread = threading.Thread(target=lambda: results.append(one.update(WEIGHTS)))
        thread.start()
        assert loading.wait(10)
    start = time.monotonic()
    one.close()
    assert 0.3 < time.monotonic() - start < 10
    assert fake.label.startswith("1-")
    assert not fake.paused
    if not interrupted:
        thread.join()
        assert [version.number for version in results] == [1]
    fake.answer = answer
    assert ask(client([fake]), 2)  # the next run takes it


def test_close_does_not_wait_for_an_update_that_waits_itself(fakes, client):
    (fake,) = fakes("hang")
    one = client([fake])
    one.submit([1, 2], GREEDY)
    wait_for(fake.completions)
    failed = []

    def update():
        try:
            one.update(WEIGHTS)
        except EngineError as error:
            failed.append(str(error))

    thread = threading.Thread(target=update)
    thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    one.close()
    assert time.monotonic() - start < 5
    thread.join(5)
    assert failed == ["the engine was closed"]
    assert (fake.label, fake.paused) == ("default", False)


def test_open_that_is_interrupted_leaves_no_half_loaded_server(fakes, client, monkeypatch):
    (fake,) = fakes(None)
    fake.weights, fake.label = "trained", "3-abc"
    loading, answer = threading.Event(), fake.answer

    def slow(method, path, body):
        if path == "/update_weights":
            loading.set()
            time.sleep(0.5)
        return answer(method, path, body)

    fake.answer = slow
    real = Future.result

    def interrupt(future, timeout=None):
        if timeout is None and loading.wait(10):
            raise KeyboardInterrupt
        return real(future, timeout)

    monkeypatch.setattr(Future, "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client([fake])
    assert (fake.label, fake.paused) == ("default", False)


def test_server_without_updates_is_refused_with_the_command(fakes, client):
    (fake,) = fakes(None, sync=False)
    one = client([fake])
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
        client([fake], require_sync=True)


def test_weights_an_earlier_run_left_are_taken_back(fakes, client):
    a, b = fakes(None, None)
    a.weights, a.label = "trained", "3-abc"
    b.paused = True
    one = client([a, b])
    assert a.label == "default"
    assert a.weights != "trained"
    assert not b.paused
    one.close()
    a.label = "loading-4-abc"
    with pytest.raises(EngineError, match="left a mixture of weights: restart it"):
        client([a, b])


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


def test_adapter_takes_the_place_of_the_one_before(fakes, client, tmp_path):
    (tmp_path / "a").mkdir()
    servers = fakes(None, None)
    one = client(servers, adapter=adapter(tmp_path / "a" / "first", 1.0))
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


def test_server_that_forgot_the_adapter_gets_it_again(fakes, client, tmp_path):
    (tmp_path / "a").mkdir()
    servers = fakes(None, None)
    one = client(servers, adapter=adapter(tmp_path / "a" / "first", 1.0))
    servers[0].adapters.clear()  # as after a restart: the request is answered with 404
    assert [sample.token_ids for sample in ask(one)] == right(weights="version-1")
    wait_for(lambda: servers[0].adapters)
    wait_for(lambda: one._pool.members[0].up)
    assert [sample.token_ids for sample in ask(one)] == right(weights="version-1")


def test_adapter_on_server_without_means_is_refused(fakes, client, tmp_path):
    (fake,) = fakes((404, "Not Found"))
    fake.later = lambda path, body: (404, "Not Found") if path == "/v1/load_lora_adapter" else None
    one = client([fake])
    (tmp_path / "a").mkdir()
    with pytest.raises(EngineError) as caught:
        one.update(adapter(tmp_path / "a" / "first", 1.0))
    assert "llmrl serve /models/stories --sync --enable-lora" in str(caught.value)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve /models/stories --enable-lora" in str(caught.value)
