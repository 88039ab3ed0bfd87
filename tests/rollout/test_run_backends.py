"""`llmrl rollout` on servers and on vLLM that fail while it runs: whose fault it is, what is kept, and how it goes on."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import signal
import time

import pytest
from fake_vllm import FakeVllm

from llmrl.cli import main
from llmrl.rollout import run, server, server_pool

ROWS = [{"id": f"r{i}", "prompt": f"Once there were {i} dogs"} for i in range(12)]
BAD = "r5"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def rollout(prompts, stories_dir, monkeypatch):
    """`rollout(out, *options)` -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(run, "read_facts", functools.cache(run.read_facts))

    def start(out, *options):
        argv = ["rollout", "--model", stories_dir, "--prompts", prompts, "--output", out, "--max_tokens", 6, *options]
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = main([str(word) for word in argv])
        return code, said.getvalue(), complained.getvalue()

    return start


@pytest.fixture
def serve(stories_tokenizer, monkeypatch):
    """`serve(fault)` -> a fake server; `fault(id)` says what it does with a row's request."""
    monkeypatch.setattr(server_pool, "_FIRST_PAUSE", 0.005)
    monkeypatch.setitem(server.ServerEngine.__init__.__kwdefaults__, "patience", 20.0)
    ids = {tuple(stories_tokenizer(row["prompt"])["input_ids"]): row["id"] for row in ROWS}
    started = []

    def start(fault=lambda row_id: None):
        def of_rows(path, body):
            row_id = ids.get(tuple(body["prompt"])) if path == "/v1/completions" else None
            return fault(row_id) if row_id else None

        started.append(FakeVllm(stories_tokenizer, fault=of_rows))
        started[-1].http.handle_error = lambda *where: None  # it would print what the client's end does to it
        started[-1].rows = lambda: [ids.get(tuple(body["prompt"])) for body in started[-1].completions()]
        return started[-1]

    yield start
    for fake in started:
        if not fake.stopping.is_set():
            fake.stop()


@pytest.fixture
def impatient(serve, monkeypatch):
    monkeypatch.setitem(server.ServerEngine.__init__.__kwdefaults__, "patience", 0.3)


@pytest.fixture
def undisturbed(rollout, serve, tmp_path):
    fake = serve()
    code, _, err = rollout(tmp_path / "whole.jsonl", "--server_url", fake.url, "--quiet")
    assert code == 0, err
    return (tmp_path / "whole.jsonl").read_bytes()


def rows(path):
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(
    ("fault", "words"),
    [((500, "boom"), "500 boom"), ("garbage", "what is not JSON"), ("empty", "an empty answer"), ("reset", "")],
)
def test_rollout_row_that_no_server_answers_fails_alone(fault, words, rollout, serve, undisturbed, tmp_path):
    faults = {BAD: fault}
    fake = serve(lambda row_id: faults.get(row_id))
    out = tmp_path / "out.jsonl"
    code, _, err = rollout(out, "--server_url", fake.url, "--quiet")
    assert code == 3, err
    assert "1 of 12 rows failed" in err
    found = rows(out)
    assert list(found) == [row["id"] for row in ROWS]
    assert [row_id for row_id, row in found.items() if "error" in row] == [BAD]
    assert found[BAD]["error"].startswith(f"row {BAD}: 6 servers in a row failed on one request")
    if fault != "empty":  # how an empty answer is worded is the client's
        assert words in found[BAD]["error"]
    faults.clear()
    fake.seen.clear()
    assert rollout(out, "--server_url", fake.url, "--quiet")[0] == 0
    assert [row_id for row_id in fake.rows() if row_id] == [BAD]
    assert out.read_bytes() == undisturbed


def test_rollout_server_that_answers_nothing_well_ends_the_run(rollout, serve, undisturbed, tmp_path):
    broken = [True]
    fake = serve(lambda row_id: (500, "boom") if broken[0] and row_id not in ("r0", "r1") else None)
    out = tmp_path / "out.jsonl"
    code, _, err = rollout(out, "--server_url", fake.url, "--quiet")
    assert code == 1
    assert "6 servers in a row failed on one request" in err
    assert "500 boom" in err
    assert "2 of 12 rows are finished" in err
    assert len(err.splitlines()) <= 3
    assert not out.exists()
    broken[0] = False
    fake.seen.clear()
    assert rollout(out, "--server_url", fake.url, "--quiet")[0] == 0
    assert set(filter(None, fake.rows())) == {row["id"] for row in ROWS[2:]}
    assert out.read_bytes() == undisturbed


def test_rollout_server_that_dies_ends_the_run_and_another_one_goes_on(
    rollout, serve, undisturbed, impatient, tmp_path
):
    out = tmp_path / "out.jsonl"

    def die_once_three_are_kept(row_id):
        end = time.monotonic() + 20
        while row_id not in ("r0", "r1", "r2"):
            shards = (tmp_path / ".out.jsonl.run" / "shards").glob("*.jsonl")
            if sum(path.read_bytes().count(b"\n") for path in shards) == 3 or time.monotonic() > end:
                return "die"
            time.sleep(0.01)
        return None

    code, _, err = rollout(out, "--server_url", serve(die_once_three_are_kept).url, "--quiet")
    assert code == 1
    assert "no server answers" in err
    assert "3 of 12 rows are finished and kept; the same command goes on with the rest" in err
    assert not out.exists()
    another = serve()
    code, said, err = rollout(out, "--server_url", another.url)
    assert code == 0, err
    assert "3 of 12 rows were done before" in said
    assert sorted(filter(None, another.rows())) == sorted(row["id"] for row in ROWS[3:])
    assert out.read_bytes() == undisturbed


def test_rollout_one_of_two_servers_dies_and_nothing_is_lost(rollout, serve, undisturbed, tmp_path):
    answered = []
    dying = serve(lambda row_id: "die" if len(answered) == 2 else answered.append(row_id))
    out = tmp_path / "out.jsonl"
    code, _, err = rollout(out, "--server_url", f"{dying.url},{serve().url}", "--quiet")
    assert (code, err) == (0, "")
    assert dying.stopping.is_set()
    assert out.read_bytes() == undisturbed


def test_rollout_without_a_server(rollout, tmp_path):
    code, _, err = rollout(tmp_path / "out.jsonl", "--server_url", "http://127.0.0.1:9", "--rollout_backend", "server")
    assert code == 1
    assert "http://127.0.0.1:9 cannot be used" in err
    assert len(err.splitlines()) <= 3


@pytest.mark.vllm
def test_rollout_killed_vllm_ends_the_run_and_the_next_one_goes_on(rollout, prompts, monkeypatch, tmp_path):
    from llmrl.rollout.shards import ShardWriter
    from llmrl.rollout.vllm_engine import VllmEngine

    out = tmp_path / "out.jsonl"
    many = [{"id": f"r{i}", "prompt": "word " * 600 if i == 7 else f"Once there were {i} dogs"} for i in range(24)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in many))
    options = ("--rollout_backend", "vllm", "--max_tokens", "250")
    with monkeypatch.context() as patch:
        kill_after(patch, ShardWriter, 3)
        patch.setattr(run, "open_engine", lambda model, **_: VllmEngine(model, own_process=True, max_num_seqs=2))
        code, _, err = rollout(out, *options)
    assert code == 1, err
    last = [line for line in err.splitlines() if line.startswith("llmrl: ")]
    assert "vLLM died" in last[0], err
    assert "of 24 rows are finished and kept; the same command goes on with the rest" in err
    assert not out.exists()
    code, said, err = rollout(out, *options)
    assert code == 3, err
    found = rows(out)
    assert list(found) == [row["id"] for row in many]
    assert [row_id for row_id, row in found.items() if "error" in row] == ["r7"]
    done = int(said.split(" of 24 rows were done before")[0].split()[-1])
    assert 2 <= done < 23, "the signal came too late to show anything"
    assert f"{24 - done} rows, 1 of them failed and {done} done before: {23 - done} samples" in said


def kill_after(monkeypatch, writer, count):
    """Kill vLLM's core once `count` rows are kept."""
    real = writer.write

    def write(self, *args, **options):
        real(self, *args, **options)
        if self.written == count:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(writer, "write", write)
