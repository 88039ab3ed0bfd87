"""Limits of turns, context, time and concurrency; a slow or hung environment holds up nobody."""

import threading
import time
from concurrent.futures import Future

import pytest
from episode_support import Base, answers, completion_order, episodes, rows
from episodes_run import SAMPLING, ByteTokenizer, engine, play, say

from llmrl.rollout.environment import Step
from llmrl.rollout.episodes import run_episodes
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.types import Message

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
