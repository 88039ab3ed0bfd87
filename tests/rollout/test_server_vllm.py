"""The client of several servers on two real vLLM servers with a real model: its numbers, new weights, and dead servers.

The servers are started once. The tests run in order: the last ones kill servers.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from http_server import Server, descendants

from llmrl.errors import EngineError, SyncError
from llmrl.rollout import server_updates
from llmrl.rollout.server import ServerEngine
from llmrl.rollout.weight_files import write_weights
from llmrl.types import FinishReason, SamplingConfig
from llmrl.vllm_compat import vllm_build, why_no_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(vllm_build() is None, reason=f"no vLLM: {why_no_vllm()}"),
]

ROOT = Path(__file__).parents[2]
WORDS = ["cat", "dog", "bird", "fish", "tree", "ball", "girl", "boy"] * 60
PROMPTS = ["Once upon a time", "The little dog ran to the park and saw a big red ball. He was very happy", "1"]
OPTIONS = ["--dtype=float32", "--max-num-seqs=32", "--max-model-len=256", "--enable-lora", "--max-lora-rank=8"]
ENVIRONMENT = {
    **os.environ,
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "llmrl",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


def serve(log, model, **options):
    command = [sys.executable, "-m", "llmrl.cli", "serve", str(model), "--sync"]
    return Server(command, log, ENVIRONMENT, options=OPTIONS, **options)


@pytest.fixture(scope="module")
def servers(tmp_path_factory, stories_dir):
    logs = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(serve(logs / str(i), stories_dir)) for i in range(2)]
        for one in pair:
            one.wait_until_healthy()
        yield pair


@pytest.fixture(scope="module")
def engine(servers, stories_dir):
    with ServerEngine(str(stories_dir), [one.url for one in servers], patience=1.0, require_sync=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(stories_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories_dir).eval()


@pytest.fixture(scope="module")
def prompts(engine):
    return [engine.tokenizer(text)["input_ids"] for text in PROMPTS]


def logprobs_of(model, ids):
    with torch.inference_mode():
        rows = model(input_ids=torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(ids[1:])]


def greedy(model, prompt, count):
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def on_each(engine, work):
    """Return what `work` returns while only one of the servers is used, for each in turn."""
    found = []
    for member in engine._pool.members:
        others = [other for other in engine._pool.members if other is not member]
        for other in others:
            other.in_flight += 10_000
        try:
            found.append(work())
        finally:
            for other in others:
                other.in_flight -= 10_000
    return found


def agrees(engine, model, prompts):
    """Both servers score and sample as transformers does with the same weights."""
    wanted = [logprobs_of(model, prompt) for prompt in prompts]
    for scores in on_each(engine, lambda: [engine.score(prompt) for prompt in prompts]):
        for found, right in zip(scores, wanted, strict=True):
            assert found == pytest.approx(right, abs=1e-3)
    sampling = SamplingConfig(temperature=0, max_tokens=12)
    for rows in on_each(engine, lambda: engine.generate(prompts, sampling)):
        for prompt, (sample,) in zip(prompts, rows, strict=True):
            whole = [*prompt, *sample.token_ids]
            assert sample.token_ids == greedy(model, prompt, len(sample.token_ids))
            assert list(sample.logprobs) == pytest.approx(logprobs_of(model, whole)[len(prompt) - 1 :], abs=1e-3)
            assert sample.policy_version == engine.version


def perturbed(stories_dir, seed):
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(seed)
    weights = load_file(stories_dir / "model.safetensors")
    return {name: t + 0.02 * torch.randn(t.shape, generator=generator) for name, t in weights.items()}


def test_answers_are_those_of_transformers(engine, model, prompts):
    assert engine.max_model_len == 256
    agrees(engine, model, prompts)


def test_temperature_leaves_logprobs_raw_and_top_k_are_ids(engine, model, prompts):
    sampling = SamplingConfig(temperature=1.7, max_tokens=10, seed=3, logprobs=3, n=4)
    for sample in engine.generate([prompts[0]], sampling)[0]:
        whole = [*prompts[0], *sample.token_ids]
        assert list(sample.logprobs) == pytest.approx(logprobs_of(model, whole)[len(prompts[0]) - 1 :], abs=1e-3)
        with torch.inference_mode():
            rows = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)[len(prompts[0]) - 1 : -1]
        values, ids = rows.topk(3)
        assert [[token for token, _ in top] for top in sample.top_logprobs] == ids.tolist()
        for top, right in zip(sample.top_logprobs, values.tolist(), strict=True):
            assert [logprob for _, logprob in top] == pytest.approx(right, abs=1e-3)


def test_stops_and_seeds(engine, prompts):
    plain = engine.generate([prompts[0]], SamplingConfig(temperature=0, max_tokens=20))[0][0]
    assert plain.finish_reason == FinishReason.LENGTH
    word = plain.text[8:14]
    stopped = engine.generate([prompts[0]], SamplingConfig(temperature=0, max_tokens=20, stop=(word,)))[0][0]
    assert stopped.finish_reason == FinishReason.STOP
    assert stopped.stop_reason == word
    assert stopped.text == plain.text[: plain.text.index(word)]
    assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)]
    assert word in engine.tokenizer.decode(stopped.token_ids)  # the ids keep the stop string
    token = plain.token_ids[5]
    at = plain.token_ids.index(token)
    by_id = engine.generate([prompts[0]], SamplingConfig(temperature=0, max_tokens=20, stop_token_ids=(token,)))[0][0]
    assert by_id.token_ids == plain.token_ids[: at + 1]
    assert by_id.stop_reason == token
    sampling = SamplingConfig(max_tokens=12, seed=11, n=3)
    first = on_each(engine, lambda: [s.token_ids for s in engine.generate([prompts[0]], sampling)[0]])
    assert first[0] == first[1]  # the seed, not the server
    assert len(set(first[0])) == 3


def test_prompts_are_scored_while_others_are_answered(engine, model, prompts):
    """Servers with LoRA: in one batch with others, a scored prompt used to end the CPU build's engine."""
    wanted = [logprobs_of(model, prompt) for prompt in prompts]
    sampling = SamplingConfig(temperature=0, max_tokens=48)
    others = [engine.submit([*prompts[i % 3], 3 + i], sampling) for i in range(150)]
    wait_for(lambda: any(other.done() for other in others))
    assert not all(other.done() for other in others), "nothing is under way"
    scores = on_each(engine, lambda: [engine.score(prompt) for prompt in prompts])
    for found in scores:
        for one, right in zip(found, wanted, strict=True):
            assert one == pytest.approx(right, abs=1e-3)
    assert all(other.result(timeout=120)[0].token_ids for other in others)


def test_json_schema_constrains(engine, prompts):
    schema = {"type": "string", "enum": ["yes", "no"]}  # without a place where this model could fill in blanks for ever
    samples = engine.generate([prompts[0]], SamplingConfig(max_tokens=60, seed=1, n=8, json_schema=schema))[0]
    assert {sample.finish_reason for sample in samples} == {FinishReason.STOP}
    assert {json.loads(sample.text) for sample in samples} <= {"yes", "no"}


@pytest.fixture(scope="module")
def adapters(stories_dir, tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(stories_dir)
        adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        folder = tmp_path_factory.mktemp("adapters") / str(seed)
        adapted.save_pretrained(folder)
        made.append((folder, adapted.eval()))
    return made


def test_adapters_are_swapped_while_running(servers, stories_dir, adapters, model, prompts):
    urls = [one.url for one in servers]
    with ServerEngine(str(stories_dir), urls, adapter=adapters[0][0]) as adapted:
        agrees(adapted, adapters[0][1], prompts)
        assert adapted.update(adapters[1][0]).number == 2
        agrees(adapted, adapters[1][1], prompts)
        base = adapted.score(prompts[1], base=True)
        assert base == pytest.approx(logprobs_of(model, prompts[1]), abs=1e-3)
        assert max(abs(a - b) for a, b in zip(base, adapted.score(prompts[1]), strict=True)) > 0.1
        name = adapted._updates.held.adapter
        for one in servers:
            assert len(get(one, "/v1/models")["data"]) == 2
            assert get(one, "/v1/models")["data"][1]["id"] == name
    for one in servers:
        assert len(get(one, "/v1/models")["data"]) == 1  # taken away at the end


def get(server, path):
    import urllib.request

    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return json.load(answer)


def test_new_weights_are_those_of_transformers_and_no_cache_is_left(engine, model, prompts, stories_dir):
    long = prompts[1] * 5  # several blocks of the prefix cache
    sampling = SamplingConfig(temperature=0, max_tokens=4)
    on_each(engine, lambda: engine.generate([long], sampling))
    weights = perturbed(stories_dir, 1)
    version = engine.update(weights)
    assert version.number == 1
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    agrees(engine, model, [*prompts, long])


def test_refused_weights_change_no_server(engine, model, prompts, stories_dir, monkeypatch, servers):
    weights = perturbed(stories_dir, 2)
    name = "model.layers.1.mlp.down_proj.weight"
    before = engine.version
    lacking = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(SyncError, match=rf"the weight update lacks {name}.*; no server has taken any of it"):
        engine.update(lacking)
    with pytest.raises(SyncError, match=rf"wrong shape: {name}; got \[64, 8\], the model has \[64, 172\]"):
        engine.update(weights | {name: weights[name][:, :8].contiguous()})

    def spoil(folder, tensors):
        from safetensors.torch import save_file

        made = write_weights(folder, tensors)
        save_file(dict(tensors) | {name: tensors[name] * 1.001}, folder / "weights.safetensors")
        return made

    monkeypatch.setattr("llmrl.rollout.server.write_weights", spoil)
    with pytest.raises(SyncError, match=f"{servers[0].url} did not take the update.*corrupted on the way.*{name}"):
        engine.update(weights)
    monkeypatch.undo()
    assert engine.version == before
    agrees(engine, model, prompts)


def test_weights_are_taken_back_when_one_server_breaks_off(engine, model, prompts, stories_dir, monkeypatch):
    """The failure is put between the staging and the end of the load on the second server, where the first has loaded."""
    before = engine.version
    member = engine._pool.members[1]
    real = member.http.post

    async def break_off(path, body=None, **options):
        if path == "/pause?mode=wait":
            raise server_updates.ServerFault("500 made up", 500)
        return await real(path, body, **options)

    # one that is down is passed over, and on a busy machine an answer may just have come too late
    wait_for(lambda: member.up)
    monkeypatch.setattr(member.http, "post", break_off)
    with pytest.raises(SyncError, match=f"{member.url} did not take the update: 500 made up.*back at version 1"):
        engine.update(perturbed(stories_dir, 3))
    monkeypatch.undo()
    assert engine.version == before
    wait_for(lambda: member.up)  # nothing was touched on it
    agrees(engine, model, prompts)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_open_takes_back_the_weights_of_another_run(servers, stories_dir, prompts):
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(stories_dir).eval()
    with ServerEngine(str(stories_dir), [one.url for one in servers]) as fresh:
        assert fresh.version.number == 0
        agrees(fresh, start, prompts)


def test_killed_server_loses_and_doubles_nothing_and_a_restarted_one_gets_the_weights(
    engine, model, prompts, servers, stories_dir, tmp_path
):
    # the run before took the weights back, and this engine notices: nothing it did not ask for is believed
    with pytest.raises(EngineError, match=r"start weights|earlier|loading"):
        raise_from_pool(engine, prompts)
    wait_for(lambda: len(engine._pool.up) == 2)
    agrees(engine, model, prompts)
    # more than both answer at once, so that some are under way whenever the first have ended
    rows = [[*prompts[i % 3], 3 + i] for i in range(200)]
    sampling = SamplingConfig(temperature=0, max_tokens=48)
    undisturbed = [row[0].token_ids for row in engine.generate(rows, sampling)]
    futures = [engine.submit(row, sampling) for row in rows]
    settled = []
    for i, future in enumerate(futures):
        future.add_done_callback(lambda f, i=i: settled.append(i))
    wait_for(lambda: len(settled) >= 4)
    kill(servers[0])
    samples = [future.result(timeout=120)[0] for future in futures]
    assert [sample.token_ids for sample in samples] == undisturbed
    assert sorted(settled) == list(range(200))
    assert {sample.policy_version for sample in samples} == {engine.version}
    assert not engine._pool.members[0].up
    # somebody starts it again, with its start weights: it gets the current ones before it is asked for anything
    with serve(tmp_path / "log", stories_dir, port=servers[0].port) as again:
        again.wait_until_healthy()
        wait_for(lambda: engine._pool.members[0].up)
        assert get(again, "/weight_info")["weight_version"] == f"1-{engine.version.fingerprint}"
        agrees(engine, model, prompts)
        kill(again)
    kill(servers[1])
    with pytest.raises(EngineError) as caught:
        engine.generate([prompts[0]], sampling)
    for one in servers:
        assert f"{one.url}: " in str(caught.value)
    assert "finished work is kept, and the same command goes on" in str(caught.value)
    assert [future.result()[0].token_ids for future in futures] == undisturbed


def raise_from_pool(engine, prompts):
    """Ask one server directly, without going on to another one."""
    try:
        engine._loop.run(one_answer(engine, prompts[0]))
    except server_updates.ServerFault as fault:
        raise EngineError(str(fault)) from None


async def one_answer(engine, prompt):
    request = engine.requests(prompt, SamplingConfig(temperature=0, max_tokens=2))[0]
    member = engine._pool.members[0]
    return await engine._pool._once(member, lambda m: engine._complete(m, request, engine._updates.held))


def kill(server):
    """Kill the server and all it started, at once, as a machine that is lost; remove what it cannot clean up itself."""
    processes = [server.process.pid, *descendants(server.process.pid)]
    shared = {segment for pid in processes for segment in shared_memory(pid)}
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait()
    for segment in shared:
        segment.unlink(missing_ok=True)


def shared_memory(pid):
    """Return the segments a process has mapped: hundreds of MiB that vLLM leaves behind when it is killed."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
    return [Path(line.split()[5]) for line in lines if "/dev/shm/psm_" in line and not line.endswith("(deleted)")]


def test_rollout_when_both_servers_are_killed_and_resumed_on_another(stories_dir, tmp_path):
    """The command, on real servers: a clear error, finished rows kept, and the same command makes the rest."""
    rows = [
        {"id": f"r{i}", "prompt": f"Once upon a time there was a {word} number {i}"} for i, word in enumerate(WORDS)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, shards = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.run" / "shards"
    command = [sys.executable, "-m", "llmrl.cli", "rollout", "--model", str(stories_dir), "--temperature", "0"]
    command += [
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--output",
        str(output),
        "--max_tokens",
        "96",
        "--server_url",
    ]

    def finished():
        return sum(path.read_bytes().count(b"\n") for path in shards.glob("*.jsonl"))

    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(serve(tmp_path / f"log{i}", stories_dir)) for i in range(2)]
        for one in pair:
            one.wait_until_healthy()
        run = subprocess.Popen(
            [*command, *(one.url for one in pair)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        stack.callback(run.kill)
        wait_for(lambda: finished() >= 3, seconds=180)
        for one in pair:
            kill(one)
        assert run.wait(timeout=120) == 1
        said = run.stderr.read()
        assert "no server answers" in said
        assert "the same command goes on with the rest" in said
    kept = finished()
    assert 3 <= kept < len(rows)
    with serve(tmp_path / "log2", stories_dir, port=pair[0].port) as again:
        again.wait_until_healthy()
        resumed = [*command, again.url]
        done = subprocess.run(resumed, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{done.stderr}\nthe server's log ends:\n{again.text()}"
    assert f"{kept} of {len(rows)} rows were done before" in done.stdout
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories_dir).eval()
    for row in (written[0], written[-1]):
        ids = row["samples"][0]["token_ids"]
        assert tuple(ids) == greedy(model, row["prompt_token_ids"], len(ids))
