"""Episodes that go on by themselves: limits, failures, and the same bytes however a run was cut into pieces."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from episodes_run import ROWS, SAMPLING, ByteTokenizer, Game, engine, play, say

from llmrl.errors import EngineError, ModelError, OutputError, RequestError, UsageError
from llmrl.rollout.environment import Step, parse_tool_calls
from llmrl.rollout.episodes import export_episodes, run_episodes
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import ShardWriter, read_shards
from llmrl.types import Episode, Message, SamplingConfig

SCRIPT = Path(__file__).with_name("episodes_run.py")


class Base:
    """Asks twice and ends."""

    tools = ()
    turns = 2

    def __init__(self, row, seed):
        self.row, self.seed, self.count = row, seed, 0

    def observe(self):
        return [Message("user", "0")]

    def step(self, answer):
        self.count += 1
        return Step([Message("user", str(self.count))], rewards={"r": self.count}, done=self.count == self.turns)


def rows(number):
    return [{"id": f"r{i}"} for i in range(number)]


def episodes(output):
    return {key: Episode.from_json(record) for key, record in read_shards(output).items()}


def exported(output):
    export_episodes(output, output / "data.jsonl")
    return (output / "data.jsonl").read_bytes()


def lines_in(output):
    return sum(path.read_bytes().count(b"\n") for path in (output / "shards").glob("*.jsonl"))


def completion_order(output):
    lines = [line for path in sorted((output / "shards").iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line)["row_id"] for line in lines]


def answers(episode):
    return [turn for turn in episode.turns if turn.is_sampled]


# what is recorded


def test_episode_holds_messages_tokens_rewards_and_metadata_of_each_turn(tmp_path):
    class Counting(Base):
        def step(self, answer):
            step = super().step(answer)
            return Step(step.messages, rewards=step.rewards, done=step.done, metadata={"said": answer.content})

    summary = play(tmp_path, rows(1), Counting, script=lambda request: "hi", source="toy", seed=5)
    (episode,) = episodes(tmp_path).values()
    assert episode.done
    assert not episode.truncated
    assert (episode.source, episode.seed, episode.sampling) == ("toy", 5, SAMPLING)
    assert [t.message.content for t in episode.turns] == ["0", "hi", "1", "hi", "2"]
    assert [t.rewards for t in episode.turns] == [{}, {"r": 1}, {}, {"r": 2}, {}]
    assert episode.metadata == {"steps": [{"said": "hi"}, {"said": "hi"}]}
    text = "user:0<|end|>assistant:hi<|end|>user:1<|end|>assistant:hi<|end|>user:2<|end|>"
    (rollout,) = episode.rollouts()
    assert list(rollout.token_ids) == ByteTokenizer().encode(text)
    assert sum(rollout.loss_mask) == 6  # twice "hi" and the end token
    assert (summary.done, summary.turns, summary.sampled_tokens, summary.rewards) == (1, 2, 6, {"r": 3.0})


def test_seeds_are_hashes_of_run_row_sample_and_turn(tmp_path):
    asked, made = [], []

    def script(request):
        asked.append(request.sampling.seed)
        return "hi"

    class Seeded(Base):
        def __init__(self, row, seed):
            super().__init__(row, seed)
            made.append(seed)

    play(tmp_path, [{"id": "a"}, {}], Seeded, script=script, samples=2, seed=9)
    pairs = [(row, sample) for row in ("a", "1") for sample in (0, 1)]
    assert sorted(asked) == sorted(derive_seed(9, *pair, turn) for pair in pairs for turn in (0, 1))
    assert sorted(made) == sorted(derive_seed(9, *pair, "environment") for pair in pairs)


def test_each_episode_gets_a_row_of_its_own(tmp_path):
    class Eats(Base):
        def observe(self):
            return [Message("user", self.row["list"].pop())]

    summary = play(tmp_path, [{"list": ["x"]}], Eats, samples=3)
    assert summary.done == 3


def test_tools_and_a_tools_answer_reach_the_model(tmp_path):
    prompts = []

    class Adder:
        tools = ({"type": "function", "function": {"name": "add"}},)

        def __init__(self, row, seed):
            self.row = row

        def observe(self):
            return [Message("user", self.row["question"])]

        def step(self, answer):
            calls, mistake = parse_tool_calls(answer.content)
            if mistake:
                return Step([Message("tool", mistake)])
            if not calls:
                return Step(rewards={"correct": float(self.row["answer"] in answer.content)}, done=True)
            return Step([Message("tool", str(sum(call.arguments["terms"])), name=call.name) for call in calls])

    calls = ['{"name": "add", ', '{"name": "add", "arguments": {"terms": [2, 3]}}']

    def script(request):
        prompts.append(ByteTokenizer().decode(request.token_ids))
        return f"<tool_call>{calls.pop(0)}</tool_call>" if calls else "it is 5"

    asked = [{"question": "2+3?", "answer": "5"}]
    summary = play(tmp_path, asked, Adder, SamplingConfig(max_tokens=100), script=script)
    assert summary.rewards == {"correct": 1.0}
    assert "'name': 'add'" in prompts[0]
    assert "not valid JSON" in prompts[1]
    assert prompts[2].endswith("tool:5assistant:")


def test_real_tokenizer_and_template(tmp_path, stories_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with ScriptedEngine(stories_tokenizer, lambda request: "once upon a time") as scripted:
        options = {"template_options": {"chat_template": template}, "progress": False}
        summary = run_episodes(scripted, rows(8), Base, SAMPLING, output=tmp_path, samples=4, **options)
    assert (summary.done, summary.turns, summary.rewrites) == (32, 64, 0)


def test_rewrites_are_counted(tmp_path, monkeypatch):
    plain = ByteTokenizer.apply_chat_template

    def forgets(self, messages, **options):  # shows the last three messages: history changes from the second answer on
        return plain(self, messages[-3:], **options)

    monkeypatch.setattr(ByteTokenizer, "apply_chat_template", forgets)

    class Long(Base):
        turns = 3

    summary = play(tmp_path, rows(2), Long)
    (one, other) = episodes(tmp_path).values()
    assert summary.rewrites == one.segments - 1 + other.segments - 1 > 0


# limits


@pytest.mark.parametrize(("limit", "turns"), [(1, 1), (3, 3)])
def test_max_turns_truncates(tmp_path, limit, turns):
    class Endless(Base):
        turns = 0

    summary = play(tmp_path, rows(1), Endless, max_turns=limit)
    (episode,) = episodes(tmp_path).values()
    assert episode.truncated
    assert episode.metadata["truncated_by"] == "max_turns"
    assert len(answers(episode)) == turns
    assert episode.turns[-1].message == Message("user", str(turns))  # the state that a value is asked of
    assert summary.truncated == {"max_turns": 1}


def test_episode_done_in_the_last_turn_is_done(tmp_path):
    assert play(tmp_path, rows(1), Base, max_turns=2).done == 1


def test_used_up_context_truncates_and_a_first_prompt_too_long_fails(tmp_path):
    class Endless(Base):
        turns = 0

        def observe(self):
            return [Message("user", "x" * (500 if self.row["id"] == "r1" else 5))]

    with engine(lambda request: "0123456789", max_model_len=120) as scripted:
        summary = run_episodes(scripted, rows(2), Endless, SAMPLING, output=tmp_path, progress=False)
    found = episodes(tmp_path)
    assert found["r0", 0].metadata["truncated_by"] == "context"
    assert len(answers(found["r0", 0])) > 1
    assert "sampling: RequestError: the prompt has" in found["r1", 0].error
    assert summary.truncated == {"context": 1}
    assert summary.failed == {"sampling: RequestError": 1}


def test_environment_may_truncate(tmp_path):
    class Gives(Base):
        def step(self, answer):
            return Step(truncated=True, rewards={"r": 0.5})

    assert play(tmp_path, rows(1), Gives).truncated == {"environment": 1}
    assert episodes(tmp_path)["r0", 0].returns == {"r": 0.5}


class SlowEngine(ScriptedEngine):
    """Answers the first turn and never the second."""

    def __init__(self):
        super().__init__(ByteTokenizer(), say)
        self.pending = []

    def _start(self, request):
        if b"assistant" in bytes(i for i in request.token_ids[:-10] if i < 256):
            self.pending.append(Future())
            return self.pending[-1]
        return super()._start(request)


@pytest.mark.parametrize("limit", ["turn_timeout", "episode_timeout"])
def test_time_limit_while_sampling_withdraws_the_request_and_keeps_the_turns(tmp_path, limit):
    scripted = SlowEngine()
    summary = run_episodes(scripted, rows(3), Base, SAMPLING, output=tmp_path, progress=False, **{limit: 0.8})
    assert all(future.cancelled() for future in scripted.pending)
    assert len(scripted.pending) == 3
    assert summary.truncated == {limit: 3}
    assert summary.abandoned == 0
    for episode in episodes(tmp_path).values():
        assert episode.metadata["truncated_by"] == limit
        assert [t.message.content for t in episode.turns if not t.is_sampled] == ["0", "1"]
        assert [t.rewards for t in answers(episode)] == [{"r": 1}]


def test_request_that_starts_after_its_limit_is_withdrawn(tmp_path):
    class Late(SlowEngine):
        def _start(self, request):
            time.sleep(0.4)
            self.pending.append(Future())
            return self.pending[-1]

    scripted = Late()
    summary = run_episodes(scripted, rows(1), Base, SAMPLING, output=tmp_path, progress=False, turn_timeout=0.2)
    assert summary.truncated == {"turn_timeout": 1}
    for _ in range(100):
        if scripted.pending and scripted.pending[0].cancelled():
            break
        time.sleep(0.05)
    assert scripted.pending[0].cancelled()


def test_turn_timeout_begins_anew_each_turn(tmp_path):
    class Steady(Base):
        turns = 6

        def step(self, answer):
            time.sleep(0.25)
            return super().step(answer)

    assert play(tmp_path / "turn", rows(1), Steady, turn_timeout=1.0).done == 1
    assert play(tmp_path / "episode", rows(1), Steady, episode_timeout=1.0).truncated == {"episode_timeout": 1}


@pytest.mark.parametrize("where", ["make", "observe", "step", "close"])
def test_hung_environment_is_left_behind_and_holds_up_nobody(tmp_path, where):
    released = threading.Event()

    class Hangs(Base):
        def hang(self, here):
            if here == where and self.row["id"] == "r0":
                released.wait(30)

        def __init__(self, row, seed):
            super().__init__(row, seed)
            self.hang("make")

        def observe(self):
            self.hang("observe")
            return super().observe()

        def step(self, answer):
            self.hang("step")
            return super().step(answer)

        def close(self):
            self.hang("close")

    # one at a time: the thread that is left behind must not keep the only place
    summary = play(tmp_path, rows(4), Hangs, turn_timeout=1.0, concurrency=1)
    assert not released.is_set()
    assert summary.abandoned == 1
    first = episodes(tmp_path)["r0", 0]
    if where == "close":
        assert summary.done == 4
    else:
        assert (summary.done, summary.truncated) == (3, {"turn_timeout": 1})
        assert len(first.turns) == (2 if where == "step" else 0)
    before = completion_order(tmp_path)
    released.set()  # the late result is dropped
    time.sleep(0.2)
    assert completion_order(tmp_path) == before


def test_late_answer_of_an_environment_asks_the_engine_nothing(tmp_path):
    released, asked = threading.Event(), []

    class Hangs(Base):
        turns = 5

        def step(self, answer):
            released.wait(10)
            return super().step(answer)

    def script(request):
        asked.append(request)
        return "hi"

    play(tmp_path, rows(1), Hangs, script=script, turn_timeout=0.2)
    released.set()
    time.sleep(0.3)
    assert len(asked) <= 2


# episodes by themselves


def test_no_barrier_a_slow_environment_slows_nobody(tmp_path):
    left, others = 15, threading.Event()
    lock = threading.Lock()

    class Mixed(Base):
        turns = 5

        def step(self, answer):
            if self.row["id"] == "r0":  # in its first step until all others have ended
                assert others.wait(20)
            return super().step(answer)

        def close(self):
            nonlocal left
            with lock:
                left -= 1
                if left == 0:
                    others.set()

    summary = play(tmp_path, rows(16), Mixed, concurrency=16)
    assert summary.done == 16
    assert completion_order(tmp_path)[-1] == "r0"


def test_256_episodes_are_under_way_at_once(tmp_path):
    gate = threading.Barrier(256, timeout=60)

    class Together(Base):
        def observe(self):
            gate.wait()
            return super().observe()

    assert play(tmp_path, rows(64), Together, samples=4, concurrency=256).done == 256


def test_concurrency_is_kept_to(tmp_path):
    lock, now, most = threading.Lock(), 0, 0

    class Counted(Base):
        def __init__(self, row, seed):
            nonlocal now, most
            super().__init__(row, seed)
            with lock:
                now += 1
                most = max(most, now)

        def step(self, answer):
            time.sleep(0.01)
            return super().step(answer)

        def close(self):
            nonlocal now
            with lock:
                now -= 1

    play(tmp_path, rows(20), Counted, concurrency=3)
    assert most == 3
    assert now == 0  # each was closed before the run returned


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

    class Ends(Base):
        turns = 1

        def step(self, answer):
            if self.row["id"] == "r0":
                while "r1" not in closed:
                    time.sleep(0.01)
                dead.set()
                raise EngineError("gone")
            if self.row["id"] != "r1":
                assert dead.wait(10)
                time.sleep(0.2)
            return super().step(answer)

        def close(self):
            closed.append(self.row["id"])

    monkeypatch.setattr(ShardWriter, "write", slow)
    with pytest.raises(EngineError, match="3 of 4 episodes are finished"):
        play(tmp_path, rows(4), Ends)
    assert set(episodes(tmp_path)) == {("r1", 0), ("r2", 0), ("r3", 0)}


def test_dead_engine_of_an_environment_stops_the_run(tmp_path):
    class Judge(Base):
        def step(self, answer):
            raise EngineError("the judge is gone")

    with pytest.raises(EngineError, match="the judge is gone"):
        play(tmp_path, rows(3), Judge)
    assert episodes(tmp_path) == {}


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
