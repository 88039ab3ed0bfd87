"""`llmrl rollout`: a row that fails in an unusual place fails alone, and what was finished is kept."""

import json
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from llmrl.errors import EngineError, UnansweredError
from llmrl.rollout import run as module

ROWS = [{"id": f"r{i}", "prompt": f"Number {i}"} for i in range(8)]


@pytest.fixture
def prompts(jsonl, tmp_path):
    return jsonl(tmp_path / "p.jsonl", ROWS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def read(out):
    return {row["id"]: row for row in map(json.loads, Path(out).read_text().splitlines())}


def finished(out):
    lines = (out.parent / f".{out.name}.run" / "shards" / "00000-00000.jsonl").read_text().splitlines()
    return [entry["row_id"] for entry in map(json.loads, lines) if not entry["failed"]]


@pytest.fixture
def answered(monkeypatch):
    """`answered(fault)`: `fault(number, future)` may answer the request of row `number` itself."""
    real = module.open_engine

    def wrap(fault):
        def opened(*args, **options):
            engine = real(*args, **options)
            start = engine._start
            numbers = {tuple(engine.tokenizer(row["prompt"])["input_ids"]): i for i, row in enumerate(ROWS)}

            def begin(request):
                future = Future()
                done = fault(numbers[request.token_ids], future)
                return future if done else start(request)

            engine._start = begin
            return engine

        monkeypatch.setattr(module, "open_engine", opened)

    return wrap


def test_rollout_answer_that_json_cannot_hold_fails_its_row_alone(rollout, prompts, out, monkeypatch):
    real, broken = module._record, []

    def record(row_id, prompt, answer):
        row = real(row_id, prompt, answer)
        if row_id == "r2" and row["samples"]:
            broken.append(row_id)
            row["samples"][0]["logprobs"] = [float("nan")]
        return row

    with monkeypatch.context() as patch:
        patch.setattr(module, "_record", record)
        ended = rollout(prompts, out)
    assert (ended.code, broken) == (3, ["r2"]), ended.err
    found = read(out)
    assert list(found) == [row["id"] for row in ROWS]
    assert found["r2"]["error"].startswith("row r2: record r2/0: expected what JSON can hold (no NaN)")
    assert [row_id for row_id, row in found.items() if "error" in row] == ["r2"]
    assert rollout(prompts, out).code == 0
    assert "error" not in read(out)["r2"]


class Panic(BaseException):
    """As the tokenizers library raises it: no Exception."""


def test_rollout_panic_of_a_tokenizer_fails_its_row_alone(rollout, prompts, out, monkeypatch):
    real = module.encode_row

    def encode(row, tokenizer):
        if row["id"] == "r2":
            raise Panic("index out of bounds")
        return real(row, tokenizer)

    monkeypatch.setattr(module, "encode_row", encode)
    ended = rollout(prompts, out)
    assert ended.code == 3, ended.err
    found = read(out)
    assert found["r2"]["error"] == "row r2: Panic: index out of bounds"
    assert [row_id for row_id, row in found.items() if "error" in row] == ["r2"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda future: future.cancel(), "the request was withdrawn"),
        (lambda future: future.set_result([]), "the engine gave no answer (IndexError)"),
    ],
)
def test_rollout_engine_without_an_answer_ends_the_run_and_is_not_waited_for(
    fault, words, rollout, prompts, out, monkeypatch
):
    real = module.open_engine

    def opened(*args, **options):
        engine = real(*args, **options)

        def submit(prompt, sampling):
            fault(future := Future())
            return future

        monkeypatch.setattr(engine, "submit", submit)
        return engine

    monkeypatch.setattr(module, "open_engine", opened)
    ended = rollout(prompts, out)
    assert ended.code == 1
    assert words in ended.refusal()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, EngineError])
@pytest.mark.parametrize("after", [False, True])
def test_rollout_rows_that_are_finished_when_it_stops_are_kept(after, stop, rollout, prompts, out, monkeypatch):
    """All rows are in the queue when the first one is written, and it stops before or after that."""
    from llmrl.rollout.shards import ShardWriter

    send, write, arrived, stopped = module._send, ShardWriter.write, threading.Semaphore(0), []

    class Counted:
        def __init__(self, finished):
            self.finished = finished

        def put(self, one):
            self.finished.put(one)
            arrived.release()

    def stops(self, *args, **options):
        first = not stopped
        if first:
            stopped.append(True)
            assert all(arrived.acquire(timeout=60) for _ in ROWS)
        if first and not after:
            raise stop("stopped")
        write(self, *args, **options)
        if first:
            raise stop("stopped")

    monkeypatch.setattr(module, "_send", lambda *args: send(*args[:-1], Counted(args[-1])))
    monkeypatch.setattr(ShardWriter, "write", stops)
    ended = rollout(prompts, out)
    assert ended.code == (130 if stop is KeyboardInterrupt else 1)
    assert f"{len(ROWS)} of {len(ROWS)} rows are finished and kept" in ended.refusal()
    assert sorted(finished(out)) == sorted(row["id"] for row in ROWS)  # the one in hand too, and none twice


def test_rollout_unanswered_rows_never_stop_it_for_good(rollout, prompts, out, answered):
    """Three rows that no server can answer lie together; each run gets past those that failed before."""
    gone = UnansweredError("6 servers in a row failed on one request")
    answered(lambda i, future: i in (1, 2, 3, 4) and (future.set_exception(gone) or True))
    ended = rollout(prompts, out)
    assert ended.code == 1
    assert "6 servers in a row failed on one request (3 rows failed one after another)" in ended.refusal()
    assert "the same command goes on with the rest" in ended.refusal()
    ended = rollout(prompts, out)
    assert ended.code == 3, ended.err
    assert [row_id for row_id, row in read(out).items() if "error" in row] == ["r1", "r2", "r3", "r4"]
    assert rollout(prompts, out).code == 3  # only they are left, and all of them fail
