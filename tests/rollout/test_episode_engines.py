"""Engines that die or do not answer under episodes: whose fault it is, what is recorded, and how it goes on."""

import threading
import time

import pytest
from episode_support import Base, episodes, exported, rows
from episodes_run import play, say

from llmrl.errors import EngineError, RequestError, UnansweredError
from llmrl.rollout.environment import Step
from llmrl.rollout.failures import FailureCount
from llmrl.rollout.shards import ShardWriter
from llmrl.types import Message


class Asks(Base):
    """Says its row's id first, so that a script knows whose request it has."""

    def observe(self):
        return [Message("user", f"{self.row['id']}.")]


def text(request):
    return bytes(i for i in request.token_ids if i < 256).decode()


def unanswered(*row_ids):
    """A script that leaves these rows without an answer."""

    def script(request):
        if any(f":{row_id}." in text(request) for row_id in row_ids):
            raise UnansweredError("6 servers in a row failed on one request")
        return say(request)

    return script


def errors(output):
    return {row_id: episode.error for (row_id, _), episode in episodes(output).items() if episode.error}


def test_dead_engine_stops_the_run_and_the_same_command_makes_the_rest(tmp_path):
    count, lock = 0, threading.Lock()

    def dies(request):
        nonlocal count
        with lock:
            count += 1
            if count > 20:
                raise EngineError("the server at :8000 is gone")
        return say(request)

    with pytest.raises(EngineError, match=r"the server at :8000 is gone\n\d+ of 36 episodes are finished") as death:
        play(tmp_path / "cut", script=dies, samples=3, concurrency=4)
    assert "the same command makes the rest" in str(death.value)
    kept = int(str(death.value).split("\n")[1].split()[0])
    found = episodes(tmp_path / "cut")
    assert 0 < kept == len(found) < 36
    assert all(episode.error is None or "no such move" in episode.error for episode in found.values())
    assert play(tmp_path / "cut", samples=3).resumed >= kept - 3  # those of r7 failed, and are tried again
    play(tmp_path / "whole", samples=3)
    assert exported(tmp_path / "cut") == exported(tmp_path / "whole")


def test_episodes_that_end_while_the_engine_dies_are_kept(tmp_path, monkeypatch):
    dead, closed, write = threading.Event(), [], ShardWriter.write

    def slow(self, key, *args, **options):  # the loop is busy with r1 while r0 finds the engine dead and the others end
        if key[0] == "r1":
            while len(closed) < 4:
                time.sleep(0.01)
        write(self, key, *args, **options)

    def script(request):
        if "r0" in text(request):
            while "r1" not in closed:
                time.sleep(0.01)
            dead.set()
            raise EngineError("gone")
        return "hi"

    class Ends(Asks):
        turns = 1

        def step(self, answer):
            if self.row["id"] != "r1":
                assert dead.wait(10)
                time.sleep(0.2)
            return super().step(answer)

        def close(self):
            closed.append(self.row["id"])

    monkeypatch.setattr(ShardWriter, "write", slow)
    with pytest.raises(EngineError, match="3 of 4 episodes are finished"):
        play(tmp_path, rows(4), Ends, script=script)
    assert set(episodes(tmp_path)) == {("r1", 0), ("r2", 0), ("r3", 0)}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_row_that_no_server_answers_fails_alone_with_all_its_samples(tmp_path, concurrency):
    poisoned = {"script": unanswered("r2"), "samples": 5, "concurrency": concurrency}
    words = "sampling: UnansweredError: 6 servers in a row failed on one request"
    for done in (25, 0):  # and again when the run is taken up
        summary = play(tmp_path / "cut", rows(6), Asks, **poisoned)
        assert summary.failed == {"sampling: UnansweredError": 5}
        assert summary.done == done
        assert errors(tmp_path / "cut") == {"r2": words}
    assert play(tmp_path / "cut", rows(6), Asks, samples=5).done == 5
    play(tmp_path / "whole", rows(6), Asks, samples=5)
    assert exported(tmp_path / "cut") == exported(tmp_path / "whole")


class Judged(Asks):
    """Asks a judge whose endpoint answers for some rows with an error."""

    broken = ()

    def step(self, answer):
        if self.row["id"] in self.broken:
            raise EngineError("the judge answered with something that is not a chat completion")
        return Step(done=True)


def test_engine_error_of_an_environment_is_its_episodes_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Judged, "broken", ("r1", "r3"))
    for done in (3, 0):
        assert play(tmp_path, rows(5), Judged, concurrency=1).done == done
        assert set(errors(tmp_path)) == {"r1", "r3"}
        assert errors(tmp_path)["r1"].startswith("environment.step: EngineError: the judge answered with something")


def test_judge_that_never_answers_ends_the_run_before_all_rows_are_burnt(tmp_path, monkeypatch):
    monkeypatch.setattr(Judged, "broken", {f"r{i}" for i in range(2, 40)})
    words = (
        r"the judge answered .* \(3 rows failed one after another\)\n5 of 40 episodes are finished .* 3 of them failed"
    )
    with pytest.raises(EngineError, match=words):
        play(tmp_path, rows(40), Judged, concurrency=1)
    assert set(errors(tmp_path)) == {"r2", "r3", "r4"}
    # rows that failed before do not count, so each run gets past them
    with pytest.raises(EngineError, match="8 of 40 episodes are finished"):
        play(tmp_path, rows(40), Judged, concurrency=1)
    assert set(errors(tmp_path)) == {f"r{i}" for i in range(2, 8)}
    monkeypatch.setattr(Judged, "broken", ())
    assert play(tmp_path, rows(40), Judged).done == 38


def test_failure_count_ends_after_different_rows_without_an_answer_between():
    failures = FailureCount(["old"])
    gone = EngineError("gone")
    for row_id, error in (
        *[("a", gone)] * 9, ("b", gone), ("c", None), ("d", gone), ("old", gone), ("e", gone), ("f", RequestError("no")),
    ):  # fmt: skip
        failures.add(row_id, error)
    with pytest.raises(EngineError, match=r"gone \(3 rows failed one after another\)"):
        failures.add("g", gone)
