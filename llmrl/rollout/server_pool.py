"""Requests over several servers: the least loaded one gets the next, a failed one is left alone until it is well again.

Everything here runs in one event loop, so nothing is locked against threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from llmrl.errors import EngineError, LlmrlError, RequestError, UnansweredError, UsageError
from llmrl.rollout.http import HEALTH_TIMEOUT, HttpServer, Refusal, ServerBusy, ServerFault

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_IN_FLIGHT = 512  # requests a server is asked at the same time; more than vLLM computes at once
RESUME = "finished work is kept, and the same command goes on once a server is back"


class _TakenOut(Exception):
    """The server was taken out before the request was sent to it."""


class Member:
    """A server of the pool.

    `in_flight` counts requests it is answering and those that wait for one of its `slots`, `faults` those it failed in a
    row; `error` is why it was taken out. `labelled` says that it carries a label for its weights, so that these can change.
    `epoch` counts how often it was given weights because it did not hold the right ones: an answer that began in an
    earlier epoch was sampled from others.
    """

    def __init__(self, http: HttpServer) -> None:
        self.http = http
        self.up = True
        self.in_flight = self.faults = self.epoch = self.turn = 0
        self.error = ""
        self.labelled = False
        self.slots = asyncio.Semaphore(_IN_FLIGHT)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.http.url


class Pool:
    """Servers that are interchangeable.

    Args:
        urls: At least one, each once.
        timeout: Seconds without an answer after which a server is asked for its health; see `HttpServer`.
        retries: How many failures of servers one request survives.
        patience: Seconds to wait for a server to come back when all are down.
        api_key: Sent to each; None takes that of the environment variable VLLM_API_KEY, as vLLM's servers do.
        revive: Called with a server that is healthy again, before it gets requests; raises when it cannot be used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        retries: int,
        patience: float,
        api_key: str | None = None,
        revive: Callable[[Member], Awaitable[None]] | None = None,
    ) -> None:
        if isinstance(urls, str) or not urls:
            raise UsageError("expected a list of at least one server, such as http://127.0.0.1:8000")
        api_key = api_key or os.environ.get("VLLM_API_KEY")
        self.members = [Member(HttpServer(url, timeout=timeout, api_key=api_key)) for url in urls]
        names = [member.url for member in self.members]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"each server once, got {', '.join(twice)} more often")
        self.timeout, self.retries, self.patience = timeout, retries, patience
        # held while a server is brought back and while all are updated: neither may meet the other half-way
        self.changing = asyncio.Lock()
        self._revive = revive
        self._someone_up = asyncio.Event()
        self._someone_up.set()
        self._down_since: float | None = None
        self._reviving: set[asyncio.Task[None]] = set()
        self._whole: set[asyncio.Task[Any]] = set()
        self._turn = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._inside = 0

    @property
    def up(self) -> list[Member]:
        """The servers that get requests."""
        return [member for member in self.members if member.up]

    async def call(self, work: Callable[[Member], Awaitable[_T]], only: Member | None = None) -> _T:
        """Let servers do `work`, one after the other, until one has done it; with `only`, that one or none.

        Raises:
            RequestError: A server refused the request itself.
            EngineError: No server is left (UnansweredError: too many failed on this request alone).
        """
        failures: list[str] = []
        busy_since: float | None = None
        pauses = 0
        while True:
            member = only or await self.pick()
            try:
                if only is not None and not only.up:
                    raise ServerFault(only.error)
                return await self._once(member, work)
            except Refusal as refusal:
                raise RequestError(f"{member.url} refused the request ({refusal.status}): {refusal}") from None
            except _TakenOut:
                continue
            except ServerFault as fault:
                if only is not None:
                    raise EngineError(f"{member.url}: {fault}") from None
                failures.append(f"{member.url}: {fault}")
                if len(failures) > self.retries:
                    raise UnansweredError(
                        f"{len(failures)} servers in a row failed on one request, the last ones: "
                        f"{'; '.join(failures[-3:])}; {RESUME}"
                    ) from None
            except ServerBusy as busy:
                now = asyncio.get_running_loop().time()
                busy_since = now if busy_since is None else busy_since
                if now - busy_since > self.timeout:
                    raise EngineError(
                        f"{member.url} has been too busy for {self.timeout:g} s ({busy}); {RESUME}"
                    ) from None
                await asyncio.sleep(_pause(pauses))
                pauses += 1

    async def _once(self, member: Member, work: Callable[[Member], Awaitable[_T]]) -> _T:
        member.in_flight += 1
        try:
            async with member.slots:
                if not member.up:  # while the request waited for its turn: it was not sent
                    raise _TakenOut
                return await self._answered(member, work)
        finally:
            member.in_flight -= 1

    async def _answered(self, member: Member, work: Callable[[Member], Awaitable[_T]]) -> _T:
        epoch = member.epoch
        try:
            try:
                answer = await work(member)
            except RequestError:
                if member.epoch == epoch:
                    raise
            if member.epoch != epoch:  # not a fault of the server as it is now
                raise ServerFault("was restarted while it answered")
            member.faults = 0
            return answer
        except ServerFault as fault:
            if member.epoch == epoch:
                self.take_out(member, str(fault))
            raise

    async def pick(self) -> Member:
        """Return the server with the fewest requests; wait for one when all are down.

        Raises:
            EngineError: None came back.
        """
        while not self.up:
            now = asyncio.get_running_loop().time()
            left = self.patience - (now - (self._down_since if self._down_since is not None else now))
            try:
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait_for(self._someone_up.wait(), left)
            except TimeoutError:
                if not self.up:
                    raise EngineError(f"no server answers. {self.report()}; {RESUME}") from None
        member = min(self.up, key=lambda m: (m.in_flight, m.turn))
        self._turn += 1
        member.turn = self._turn
        return member

    def report(self) -> str:
        """Return each server that is out with its last error."""
        return "; ".join(f"{m.url}: {m.error}" for m in self.members if not m.up)

    def take_out(self, member: Member, why: str) -> None:
        """Give a server no more requests until it is healthy and `revive` lets it back in."""
        if not member.up:
            return
        member.up, member.error = False, why
        member.faults += 1
        if not self.up:
            self._someone_up.clear()
            self._down_since = asyncio.get_running_loop().time()
        task = asyncio.create_task(self._bring_back(member))
        self._reviving.add(task)
        task.add_done_callback(self._reviving.discard)

    async def _bring_back(self, member: Member) -> None:
        attempt, cause = member.faults - 1, member.error
        while True:
            await asyncio.sleep(_pause(attempt))
            attempt += 1
            with suppress(ServerFault, ServerBusy, Refusal):  # the error it was taken out for says more
                await member.http.get("/health", timeout=HEALTH_TIMEOUT)
                async with self.changing:
                    try:
                        if self._revive is not None:
                            await self._revive(member)
                    except Exception as error:  # whatever it is (a full disk, say), it is tried again
                        known = isinstance(error, ServerFault | ServerBusy | Refusal | LlmrlError)
                        why = str(error) if known else f"{type(error).__name__}: {error}"
                        member.error = cause if why in cause else f"{cause}; not taken back: {why}"
                        continue
                    member.up, self._down_since = True, None
                    self._someone_up.set()
                return

    # requests and updates

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Around a request with all its retries: an update waits for it, or it waits for the update."""
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    @asynccontextmanager
    async def update(self) -> AsyncIterator[None]:
        """Around an update: no request is under way, no server is being brought back."""
        self._open.clear()
        try:
            await self._idle.wait()
            async with self.changing:
                yield
        finally:
            self._open.set()

    async def whole(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do what must not be left half-way: it goes on when its caller is cancelled, and `calm` waits for it."""
        task = asyncio.ensure_future(work)
        self._whole.add(task)
        task.add_done_callback(self._whole.discard)
        return await asyncio.shield(task)

    async def calm(self) -> None:
        """Wait for what must not be left half-way, at most the longest time of a request."""
        if self._whole:
            _log.warning("new weights are on their way to the servers; closing waits until they have arrived")
            await asyncio.wait(self._whole, timeout=self.timeout)

    async def close(self) -> None:
        """Close all connections."""
        for task in list(self._reviving):
            task.cancel()
        for member in self.members:
            with suppress(Exception):
                await member.http.close()


def _pause(attempt: int) -> float:
    return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(max(attempt, 0), 16))
