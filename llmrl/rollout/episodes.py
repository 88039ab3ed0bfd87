"""Multi-turn episodes: each goes on by itself, in a thread of its own, and the engine batches what they ask for.

There is no barrier per turn, so a slow environment slows nobody else. One loop starts the threads, writes down each
episode as it ends, and watches the time limits. A thread cannot be killed: one whose environment hangs past a limit is
left behind, its episode is recorded as truncated with the turns up to there, and its late result is dropped.

The seed of turn `t` of sample `s` of a row is `derive_seed(seed, row id, s, t)`, that of its environment
`derive_seed(seed, row id, s, "environment")`: nothing depends on the order of requests, on the number of processes, or
on where a run was killed and taken up again.
"""

from __future__ import annotations

import copy
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.errors import EngineError, UnansweredError, UsageError
from llmrl.rollout.chat import Conversation
from llmrl.rollout.environment import Environment, MakeEnvironment, Step
from llmrl.rollout.failures import EngineDied, FailureCount
from llmrl.rollout.protocols import Engine, Sample
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import ShardWriter, Stored, claim_run, export_records, scan_shards
from llmrl.rollout.summary import EpisodeSummary, Tally
from llmrl.types import Episode, SamplingConfig, Turn

_IDLE_SECONDS = 0.5  # how long the loop sleeps at most: what was written is forced onto the disk once a second
_CLOSE_SECONDS = 30.0  # for an environment's close() where no turn_timeout is set
_GRACE_SECONDS = 2.0  # for the environments of a run that is stopped to close


def run_episodes(
    engine: Engine,
    rows: Sequence[Mapping[str, Any]],
    make_environment: MakeEnvironment,
    sampling: SamplingConfig,
    *,
    output: Path | str,
    samples: int = 1,
    seed: int = 0,
    max_turns: int = 16,
    concurrency: int = 64,
    turn_timeout: float | None = None,
    episode_timeout: float | None = None,
    source: str = "",
    fingerprint: str = "",
    template_options: Mapping[str, Any] | None = None,
    window: int | None = None,
    retry_failed: bool = True,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> EpisodeSummary:
    """Play `samples` episodes a row and append them to the shards in `output`; go on where an earlier run stopped.

    An environment or a request that raises ends its own episode, which is recorded with the error; when engines do not
    answer for several rows one after another, the run ends. `export_episodes` makes the data set when all are done.

    Args:
        engine: What the answers are sampled from.
        rows: The input. A row's `id` (text) names it; without one its number does.
        make_environment: Called once an episode with a copy of the row and the environment's seed.
        sampling: How each turn is sampled; `n` is 1 and `seed` null, which `samples` and `seed` stand for.
        output: The run's folder.
        samples: Episodes a row.
        seed: The run's seed.
        max_turns: Most sampled turns of an episode.
        concurrency: Most episodes under way at once, each with a thread.
        turn_timeout: Seconds for a turn, which is sampling and the environment's step, and for the opening.
        episode_timeout: Seconds for an episode.
        source: Name of the data set or environment, recorded with each episode.
        fingerprint: Names the model and tokenizer; a folder takes episodes of one.
        template_options: Passed to the chat template.
        window: Exchanges that the model reads, the last ones; None is all, see `Conversation`.
        retry_failed: Play again what an earlier run recorded with an error.
        rank: This process's number; it plays the rows whose number is `rank` modulo `world`.
        world: Number of processes.
        progress: Show a bar.

    Raises:
        DataError: Two rows have one id, or a row is not JSON.
        EngineError: `engine` died, or does not answer, or one that the environments ask (a judge, a simulated user)
            does not. What is finished is kept, the rest is left to the next run of the same command; the same holds
            for KeyboardInterrupt.
        ModelError: The tokenizer has no chat template.
        OutputError: `output` holds another run, or the disk is full.
        UsageError: An argument is out of range.
    """
    _check(sampling, samples=samples, max_turns=max_turns, concurrency=concurrency, rank=rank, world=world)
    for name, limit in (("turn_timeout", turn_timeout), ("episode_timeout", episode_timeout)):
        if limit is not None and not limit > 0:
            raise UsageError(f"{name}: expected seconds > 0, or null for no limit, got {limit}")
    options = dict(template_options or {})
    Conversation(
        engine.tokenizer, template_options=options, window=window
    )  # without a chat template no episode can begin
    identity = {"sampling": sampling.to_json(), "max_turns": max_turns, "template_options": options}
    identity |= {} if window is None else {"window": window}
    ids = claim_run(output, rows, samples, seed=seed, source=source, fingerprint=fingerprint, **identity)
    plan = _Plan(
        engine, make_environment, sampling, seed, max_turns, turn_timeout or math.inf, episode_timeout or math.inf,
        source, options, window,
    )  # fmt: skip
    tally = Tally()
    with ShardWriter(output, rank) as writer:
        stored = scan_shards(output)
        mine = [(row_id, sample) for row_id in ids[rank::world] for sample in range(samples)]
        todo = [pair for pair in mine if _is_open(stored.get(pair), retry_failed)]
        position = {row_id: number for number, row_id in enumerate(ids)}
        resumed = len(mine) - len(todo)
        with _bar(len(mine), resumed, show=progress and rank == 0) as bar:

            def keep(episode: Episode, seconds: float) -> None:
                key = (episode.row_id, episode.sample)
                writer.write(
                    key,
                    episode.to_json(),
                    position=position[episode.row_id],
                    failed=episode.error is not None,
                    attempt=stored[key].attempt + 1 if key in stored else 0,
                    notes={"seconds": round(seconds, 3)},
                )
                tally.add(episode)
                bar.update()

            pairs = ((*pair, rows[position[pair[0]]]) for pair in todo)
            failures = FailureCount(row_id for (row_id, _), one in stored.items() if one.failed)
            try:
                abandoned = _play_all(plan, pairs, concurrency, keep, writer.sync, failures)
            except (EngineError, KeyboardInterrupt) as stopped:
                finished = f"{resumed + writer.written} of {len(mine)} episodes are finished and kept in {output}"
                failed = sum(tally.summary(resumed=resumed, abandoned=0).failed.values())
                words = f"{finished}{f', {failed} of them failed' if failed else ''}; the same command makes the rest"
                if isinstance(stopped, EngineError):
                    raise EngineError(f"{stopped}\n{words}") from stopped
                raise KeyboardInterrupt(words) from None
    return tally.summary(resumed=resumed, abandoned=abandoned)


def export_episodes(folder: Path | str, path: Path | str, *, partial: bool = False) -> int:
    """Write a run's episodes as JSONL, sorted by the row's place in the input, then by sample; return their number.

    Raises:
        OutputError: Episodes are missing and `partial` is not set.
    """
    return export_records(folder, path, partial=partial)


def _check(sampling: SamplingConfig, *, rank: int, world: int, **counts: int) -> None:
    for name, value in {**counts, "world": world}.items():
        if value < 1:
            raise UsageError(f"{name}: expected a number >= 1, got {value}")
    if not 0 <= rank < world:
        raise UsageError(f"rank: expected a number from 0 to {world - 1} (world is {world}), got {rank}")
    if sampling.n != 1:
        raise UsageError(f"sampling.n: expected 1, got {sampling.n}; samples={sampling.n} plays as many episodes a row")
    if sampling.seed is not None:
        raise UsageError(
            f"sampling.seed: expected null, got {sampling.seed}; give it as seed, each turn derives its own"
        )


def _is_open(stored: Stored | None, retry_failed: bool) -> bool:
    return stored is None or (stored.failed and retry_failed)


def _bar(total: int, initial: int, *, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc="episodes", unit="episode", disable=not show, dynamic_ncols=True)


@dataclass(frozen=True)
class _Plan:
    """What all episodes of a run share; no limit is infinity."""

    engine: Engine
    make_environment: MakeEnvironment
    sampling: SamplingConfig
    seed: int
    max_turns: int
    turn_timeout: float
    episode_timeout: float
    source: str
    template_options: Mapping[str, Any]
    window: int | None


_Events = queue.SimpleQueue["tuple[_Live, Episode | EngineError | None]"]


class _Live(threading.Thread):
    """One episode under way. It posts its episode, or that the engine is dead, and then None when its thread ends.

    The thread and the loop that watches its deadline may both want to end it; who gets `claim` does. What the loop
    would record (`turns`, `steps`) is replaced whole and never changed in place, so it can be read at any time.
    """

    def __init__(self, plan: _Plan, pair: tuple[str, int, Mapping[str, Any]], events: _Events) -> None:
        self.row_id, self.sample, row = pair
        super().__init__(name=f"episode {self.row_id}/{self.sample}", daemon=True)
        self.plan = plan
        self.row = copy.deepcopy(dict(row))
        self.turns: tuple[Turn, ...] = ()
        self.steps: tuple[dict[str, Any], ...] = ()
        self.where = "make_environment"
        self.failure: BaseException | None = None
        self.begun = time.monotonic()
        self._events = events
        self._future: Future[list[Sample]] | None = None
        self._claimed = False
        self._lock = threading.Lock()
        self._start_clock()

    def run(self) -> None:
        """Play the episode, post what became of it, and close its environment."""
        environments: list[Environment] = []
        outcome: Episode | EngineError
        try:
            outcome = self.episode(truncated_by=self._play(environments))
        except EngineDied as died:
            outcome = died.error
        except BaseException as error:  # a SystemExit in an environment ends its episode, not the run
            self.failure = error
            outcome = self.episode(error=f"{self.where}: {type(error).__name__}: {error}")
        limit = self.plan.turn_timeout
        self.deadline = time.monotonic() + (limit if limit < math.inf else _CLOSE_SECONDS)
        if self.claim():
            self._events.put((self, outcome))
        try:
            for environment in environments:
                getattr(environment, "close", lambda: None)()
        except Exception as error:  # the episode is whole without it
            what = f"{type(error).__name__}: {error}"
            print(f"llmrl: {self.name}: its environment did not close: {what}", file=sys.stderr, flush=True)
        finally:
            self._events.put((self, None))

    def episode(self, *, truncated_by: str | None = None, error: str | None = None) -> Episode:
        """Return the record of what was played so far; neither a limit nor an error means that it is done."""
        metadata: dict[str, Any] = {"truncated_by": truncated_by} if truncated_by else {}
        if any(self.steps):
            metadata["steps"] = list(self.steps)
        return Episode(
            row_id=self.row_id,
            sample=self.sample,
            turns=self.turns,
            done=not truncated_by and not error,
            truncated=bool(truncated_by),
            error=error,
            source=self.plan.source,
            seed=self.plan.seed,
            sampling=self.plan.sampling,
            metadata=metadata,
        )

    def claim(self) -> bool:
        """Return True to whoever asks first, who then decides what becomes of the episode."""
        with self._lock:
            first, self._claimed = not self._claimed, True
        return first

    def withdraw(self) -> bool:
        """Cancel the request under way; False where the thread is somewhere else and cannot be reached."""
        return self._future is not None and self._future.cancel()

    def _play(self, environments: list[Environment]) -> str | None:
        """Play to the end and return what cut it, or None when the environment says done."""
        plan = self.plan
        environment = plan.make_environment(self.row, self._seed("environment"))
        environments.append(environment)
        if not isinstance(environment, Environment):
            raise TypeError(f"expected tools, observe and step, got a {type(environment).__name__}")
        self.where = "conversation"
        tools = list(environment.tools) or None
        conversation = Conversation(
            plan.engine.tokenizer, tools=tools, template_options=dict(plan.template_options), window=plan.window
        )
        self.where = "environment.observe"
        opening = environment.observe()
        self.where = "conversation"
        conversation.add(*opening)
        for turn in range(plan.max_turns):
            self._start_clock()
            self.where = "conversation"
            prompt = conversation.prompt()
            self.turns = conversation.turns
            if turn and len(prompt) >= plan.engine.max_model_len:
                return "context"
            self.where = "sampling"
            sample = self._sample(prompt, self._seed(turn))
            self.where = "conversation"
            message = conversation.answer(sample)
            self.turns = conversation.turns
            self.where = "environment.step"
            step = environment.step(message)
            if not isinstance(step, Step):
                raise TypeError(f"expected a Step, got a {type(step).__name__}")
            self.where = "conversation"
            conversation.reward(step.rewards)
            self.turns, self.steps = conversation.turns, (*self.steps, dict(step.metadata))
            conversation.add(*step.messages)
            if step.done or step.truncated:
                break
        self.turns = conversation.turns  # with the last observations
        return "environment" if step.truncated else None if step.done else "max_turns"

    def _sample(self, prompt: Sequence[int], seed: int) -> Sample:
        try:
            self._future = self.plan.engine.submit(prompt, replace(self.plan.sampling, seed=seed))
            if self._claimed:  # the limit passed before there was something to withdraw
                self._future.cancel()
            sample = self._future.result()[0]
        except UnansweredError:  # the request may be the cause
            raise
        except EngineError as error:
            raise EngineDied(error) from error
        self._future = None
        if self._claimed:
            raise CancelledError
        return sample

    def _seed(self, part: int | str) -> int:
        return derive_seed(self.plan.seed, self.row_id, self.sample, part)

    def _start_clock(self) -> None:
        turn, whole = time.monotonic() + self.plan.turn_timeout, self.begun + self.plan.episode_timeout
        self.limit = "turn_timeout" if turn < whole else "episode_timeout"
        self.deadline = min(turn, whole)


def _play_all(
    plan: _Plan,
    pairs: Iterable[tuple[str, int, Mapping[str, Any]]],
    concurrency: int,
    keep: Callable[[Episode, float], None],
    idle: Callable[[], None],
    failures: FailureCount,
) -> int:
    """Play each (row id, sample, row), call `keep` with each episode as it ends; return how many threads were left."""
    events: _Events = queue.SimpleQueue()
    live: set[_Live] = set()
    waiting = iter(pairs)
    abandoned = 0
    try:
        while True:
            now = time.monotonic()
            for one in [one for one in live if one.deadline <= now]:
                if one.claim():
                    keep(one.episode(truncated_by=one.limit), now - one.begun)
                elif one.deadline > now:  # it ended meanwhile, and has a new deadline to close its environment by
                    continue
                live.discard(one)
                abandoned += not one.withdraw()
            while len(live) < concurrency and (pair := next(waiting, None)):
                one = _Live(plan, pair, events)
                live.add(one)  # first, so that an interrupt in between stops it too
                one.start()
            if not live and events.empty():
                return abandoned
            try:
                wait = min([_IDLE_SECONDS, *(one.deadline - now for one in live)])
                one, outcome = events.get(timeout=max(wait, 0))
            except queue.Empty:
                idle()
                continue
            if isinstance(outcome, EngineError):
                raise outcome
            if outcome is None:
                live.discard(one)
            else:
                keep(outcome, time.monotonic() - one.begun)
                failures.add(one.row_id, one.failure)
    except (EngineError, KeyboardInterrupt):
        _stop(live)
        _keep_finished(events, keep)
        raise
    except BaseException:
        _stop(live)
        raise


def _stop(live: Iterable[_Live]) -> None:
    """End what is under way without a record of it, and give the environments a moment to close."""
    for one in live:
        one.claim()
        one.withdraw()
    end = time.monotonic() + _GRACE_SECONDS
    for one in [one for one in live if one.is_alive()]:
        one.join(max(0.0, end - time.monotonic()))


def _keep_finished(events: _Events, keep: Callable[[Episode, float], None]) -> None:
    while not events.empty():
        one, outcome = events.get()
        if isinstance(outcome, Episode):
            keep(outcome, time.monotonic() - one.begun)
