"""Failures, full disks, and the same bytes however a run was cut into pieces."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from episode_support import Base, answers, completion_order, episodes, exported, lines_in, rows
from episodes_run import ROWS, ByteTokenizer, Game, play

from llmrl.errors import ModelError, OutputError, RequestError, UsageError
from llmrl.rollout.environment import Step
from llmrl.rollout.episodes import export_episodes
from llmrl.types import Message, SamplingConfig

SCRIPT = Path(__file__).with_name("episodes_run.py")


# failures


def test_failure_ends_its_own_episode_and_says_where(tmp_path, capsys):
    class Breaks(Base):
        def __init__(self, row, seed):
            super().__init__(row, seed)
            self.fail("r0", OSError("no board"))

        def fail(self, row_id, error):
            if self.row["id"] == row_id:
                raise error

        def observe(self):
            self.fail("r1", KeyError("question"))
            return [] if self.row["id"] == "r2" else super().observe()

        def step(self, answer):
            self.fail("r3", SystemExit(3))
            if self.row["id"] == "r4":
                return None
            if self.row["id"] == "r5":
                return Step([Message("user", "<|end|>" + "\ud800")])
            if self.row["id"] == "r6":
                return Step()
            return super().step(answer)

        def close(self):
            self.fail("r7", ValueError("stuck"))

    def script(request):
        if b"r8" in bytes(i for i in request.token_ids if i < 256):
            raise RequestError("not this one")
        return "hi"

    summary = play(tmp_path, rows(10), Breaks, script=script)
    found = {row_id: episode.error for (row_id, _), episode in episodes(tmp_path).items()}
    assert found["r0"] == "make_environment: OSError: no board"
    assert found["r1"] == "environment.observe: KeyError: 'question'"
    assert found["r2"].startswith("conversation: DataError: prompt() found no message")
    assert found["r3"] == "environment.step: SystemExit: 3"
    assert found["r4"] == "environment.step: TypeError: expected a Step, got a NoneType"
    assert found["r5"].startswith("conversation: UnicodeEncodeError")
    assert found["r6"].startswith("environment.step: DataError: Step.messages: expected a message to go on with")
    assert found["r7"] is None
    assert found["r9"] is None
    assert "its environment did not close: ValueError: stuck" in capsys.readouterr().err
    assert summary.failed["environment.step: SystemExit"] == 1
    assert summary.done == 3
    assert len(answers(episodes(tmp_path)["r3", 0])) == 1


def test_request_error_keeps_the_turns_before_it(tmp_path):
    def script(request):
        if b"user:1" in bytes(i for i in request.token_ids if i < 256):
            raise RequestError("not this one")
        return "hi"

    play(tmp_path, rows(1), Base, script=script)
    (episode,) = episodes(tmp_path).values()
    assert episode.error == "sampling: RequestError: not this one"
    assert [t.message.content for t in episode.turns] == ["0", "hi", "1"]


def test_something_else_than_an_environment_is_refused(tmp_path):
    assert play(tmp_path, rows(1), lambda row, seed: object()).failed == {"make_environment: TypeError": 1}
    assert "expected tools, observe and step, got a object" in episodes(tmp_path)["r0", 0].error


def test_tokenizer_without_chat_template_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="no chat template"):
        play(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_episodes_are_tried_again_unless_told_not_to(tmp_path):
    class Fails(Base):
        def step(self, answer):
            raise ValueError("down")

    assert play(tmp_path, rows(3), Fails).failed == {"environment.step: ValueError": 3}
    again = play(tmp_path, rows(3), Base, retry_failed=False)
    assert (again.resumed, again.episodes) == (3, 0)
    again = play(tmp_path, rows(3), Base)
    assert (again.resumed, again.done) == (0, 3)
    assert all(episode.done for episode in episodes(tmp_path).values())
    assert play(tmp_path, rows(3), Base).resumed == 3


def test_newest_failure_is_the_one_that_is_kept_whoever_tried(tmp_path):
    def fails(words):
        def make(row, seed):
            raise ValueError(words)

        return make

    play(tmp_path, rows(2), fails("first"), rank=0, world=2)
    play(tmp_path, rows(2), fails("first"), rank=1, world=2)
    play(tmp_path, rows(2), fails("second"))
    assert [e.error for e in episodes(tmp_path).values()] == ["make_environment: ValueError: second"] * 2


def test_interrupt_keeps_what_is_finished_and_closes_environments(tmp_path):
    closed = []

    class Interrupts(Base):
        def step(self, answer):
            if self.row["id"] == "r5":
                while lines_in(tmp_path) < 5:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            return super().step(answer)

        def close(self):
            closed.append(self.row["id"])

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    try:
        with pytest.raises(
            KeyboardInterrupt, match=r"\d of 6 episodes are finished .* the same command makes the rest"
        ):
            play(tmp_path, rows(6), Interrupts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert {row_id for row_id, _ in episodes(tmp_path)} == {f"r{i}" for i in range(5)}
    assert sorted(closed) == [f"r{i}" for i in range(6)]


def test_full_disk_keeps_finished_work(tmp_path, monkeypatch):
    real, count = os.write, 0

    def full(fd, data):
        nonlocal count
        if bytes(data[:6]) == b'{"crc3':
            count += 1
            if count > 5:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr("llmrl.rollout.shards.os.write", full)
    words = "No space left on device; free some space and run the same command again. The 5 records before it are kept"
    with pytest.raises(OutputError, match=words):
        play(tmp_path / "cut")
    monkeypatch.undo()
    assert len(episodes(tmp_path / "cut")) == 5
    play(tmp_path / "cut")
    play(tmp_path / "whole")
    assert exported(tmp_path / "cut") == exported(tmp_path / "whole")


# resume and several processes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"sampling": SamplingConfig(max_tokens=17)}, r"sampling\.max_tokens was 16, is 17"),
        ({"samples": 2}, "samples was 1, is 2"),
        ({"rows": ROWS[:11]}, r"rows\.count was 12, is 11"),
        ({"max_turns": 3}, "max_turns was 16, is 3"),
        ({"template_options": {"chat_template": "other"}}, r"template_options\.chat_template"),
        ({"source": "other"}, "source was '', is 'other'"),
        ({"fingerprint": "qwen"}, "fingerprint was '', is 'qwen'"),
    ],
)
def test_folder_of_another_run_is_refused(tmp_path, change, words):
    play(tmp_path)
    before = completion_order(tmp_path)
    with pytest.raises(OutputError, match=words):
        play(tmp_path, **change)
    assert completion_order(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling": SamplingConfig(n=2)}, "samples=2 plays as many"),
        ({"sampling": SamplingConfig(seed=2)}, "give it as seed"),
        ({"samples": 0}, "samples: expected a number >= 1"),
        ({"max_turns": 0}, "max_turns: expected a number >= 1"),
        ({"concurrency": 0}, "concurrency: expected a number >= 1"),
        ({"turn_timeout": 0}, "turn_timeout: expected seconds > 0"),
        ({"episode_timeout": -1.0}, "episode_timeout: expected seconds > 0"),
        ({"rank": 2, "world": 2}, r"rank: expected a number from 0 to 1 \(world is 2\), got 2"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, change, words):
    with pytest.raises(UsageError, match=words):
        play(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_export_waits_for_all_processes(tmp_path):
    play(tmp_path, rank=0, world=2)
    with pytest.raises(OutputError, match="holds 6 of 12 records, 6 are missing"):
        export_episodes(tmp_path, tmp_path / "data.jsonl")
    assert export_episodes(tmp_path, tmp_path / "data.jsonl", partial=True) == 6
    play(tmp_path, rank=1, world=2)
    assert export_episodes(tmp_path, tmp_path / "data.jsonl") == 12


def test_export_says_nothing_of_the_clock(tmp_path, monkeypatch):
    play(tmp_path / "one", concurrency=1)
    monkeypatch.setattr(Game, "pause", 0.02)
    play(tmp_path / "two", concurrency=12)
    assert completion_order(tmp_path / "one") != completion_order(tmp_path / "two")
    assert exported(tmp_path / "one") == exported(tmp_path / "two")
    assert '"notes": {"seconds": ' in next((tmp_path / "one" / "shards").iterdir()).read_text()


def start(output, rank=0, world=1):
    command = [sys.executable, str(SCRIPT), str(output), str(rank), str(world)]
    path = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parents[2] / "kernels")])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def kill_after(output, lines, **options):
    """Start a process and kill -9 it once it has added `lines` lines; False when it ended before."""
    before = lines_in(output)
    with start(output, **options) as process:
        while process.poll() is None and lines_in(output) < before + lines:
            time.sleep(0.002)
        time.sleep(0.03 * random.random())
        process.kill()
        process.stdout.read()
    return process.returncode == -signal.SIGKILL


def test_killed_runs_and_two_processes_export_the_same_bytes(tmp_path):
    with start(tmp_path / "whole") as process:
        assert "36 episodes" in process.stdout.read()
    whole = exported(tmp_path / "whole")
    assert len(whole.splitlines()) == 36

    with start(tmp_path / "two", 0, 2) as one, start(tmp_path / "two", 1, 2) as other:
        assert "18 episodes" in one.stdout.read()
        assert "18 episodes" in other.stdout.read()
    assert exported(tmp_path / "two") == whole

    killed = [kill_after(tmp_path / "cut", random.randint(1, 6)) for _ in range(3)]
    assert killed[0]
    assert 0 < len(episodes(tmp_path / "cut")) < 36
    # a kill between two system calls tears nothing: tear the line by hand, as a power cut would
    shard = sorted((tmp_path / "cut" / "shards").iterdir())[-1]
    shard.write_bytes(shard.read_bytes()[: -random.randint(1, 500)])
    with start(tmp_path / "cut") as process:
        assert "kept from before" in process.stdout.read()
    assert exported(tmp_path / "cut") == whole

    # and taken up by another number of processes
    assert kill_after(tmp_path / "other", 4, rank=0, world=2)
    with start(tmp_path / "other") as process:
        assert "kept from before" in process.stdout.read()
    assert exported(tmp_path / "other") == whole


# what people read


def test_rewards_are_averaged_over_the_episodes_that_did_not_fail(tmp_path):
    class Mixed(Base):
        def step(self, answer):
            if self.row["id"] == "r0":
                raise ValueError("down")
            return Step(
                done=True, rewards={"a": 1.0 + (self.row["id"] == "r1")} | ({"b": 3} if self.row["id"] == "r2" else {})
            )

    assert play(tmp_path, rows(4), Mixed).rewards == {"a": 4 / 3, "b": 1.0}


def test_summary_in_words(tmp_path):
    summary = play(tmp_path, samples=2)
    sentence = summary.sentence()
    assert sentence.startswith(
        f"24 episodes ({summary.done} done, {24 - summary.done} failed in environment.step: ValueError)"
    )
    assert f"{summary.turns} turns, {summary.sampled_tokens} sampled tokens" in sentence
    table = summary.table().splitlines()
    assert table[0].split() == ["episodes", "24"]
    assert any(line.startswith("mean score ") for line in table)
    assert "24 kept from before" in play(tmp_path, samples=2, retry_failed=False).sentence()


def test_bar_is_shown_unless_told_not_to(tmp_path, capsys):
    play(tmp_path / "one", rows(2), Base, progress=True)
    assert "episodes: 100%" in capsys.readouterr().err
    play(tmp_path / "two", rows(2), Base)
    assert capsys.readouterr().err == ""
