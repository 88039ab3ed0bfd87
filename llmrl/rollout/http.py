"""One HTTP server and what can go wrong with it, sorted by what has to be done; and a thread that runs the requests.

`ServerFault`: the server failed, another one may answer the same request. `ServerBusy`: ask again later. `Refusal`: the
request itself is wrong, and would be for any server.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from llmrl.errors import EngineError, UsageError
from llmrl.rollout.engine import settle

_T = TypeVar("_T")
_BUSY = (429, 503)
_CONNECT_TIMEOUT = HEALTH_TIMEOUT = 10.0
# how many timeouts a request may take on a server that is healthy: one that never answers this one request ends here
_LONGEST_WAIT = 10
# vLLM closes a connection that was idle for 5 s; one that is closed just when it is used again looks like a dead server
_KEEP_ALIVE = 2.0
_LONGEST_MESSAGE = 600
# how vLLM wraps the error of a worker process
_WRAPPED = re.compile(
    r"^(?:Call to \w+ method failed: )?(?:Worker failed with error ['\"](?P<inner>.*)['\"], please check the stack.*)$",
    re.S,
)


class ServerFault(Exception):
    """The server failed. `status` is what it answered; None when there was no answer, or none that can be read."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class LostConnection(ServerFault):
    """The connection broke before an answer came."""


class ServerBusy(Exception):
    """The server asks to be asked later."""


class Refusal(Exception):
    """The server refuses the request as such."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class HttpServer:
    """A server by its URL. Used in one event loop only.

    Args:
        url: Such as http://127.0.0.1:8000; a path after the port stays in front of every request's.
        timeout: Seconds without an answer after which the server is asked for its health. As long as it is healthy the
            same request goes on waiting, since it may only be queued there; after ten timeouts it is given up.
        api_key: Sent as a bearer token.
    """

    def __init__(self, url: str, *, timeout: float, api_key: str | None = None) -> None:
        self.url = check_url(url)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout

        def client(**limits: Any) -> httpx.AsyncClient:
            return httpx.AsyncClient(
                base_url=self.url,
                headers=headers,
                # how many requests are under way is for the caller to say: one that asks for health must never queue
                limits=httpx.Limits(max_connections=None, **limits),
                trust_env=False,  # a proxy for the outside world does not lead to servers of ours
            )

        self._client = client(keepalive_expiry=_KEEP_ALIVE)
        self._unshared = client(max_keepalive_connections=0)  # a connection a request

    async def get(self, path: str, *, timeout: float | None = None) -> Any:
        """Return the JSON answer to a GET; None when it is empty. With a `timeout` of its own it waits no longer.

        A server closes an idle connection just when it is used again now and then, the more often the busier the machine
        is. To ask twice for a state is harmless, the second time on a new connection.
        """
        return await self._twice("GET", path, None, timeout)

    async def post(self, path: str, body: Any = None, *, timeout: float | None = None, harmless: bool = False) -> Any:
        """Return the JSON answer to a POST; None when it is empty, its text when it is none.

        With a `timeout` of its own it waits no longer, however healthy the server is. `harmless`: it changes nothing on the
        server, and is sent once more when the connection breaks.

        Raises:
            ServerFault: No connection, no answer in time, a broken answer, or a status of 500 and more.
            ServerBusy: Status 429 or 503.
            Refusal: Any other status that is no success.
        """
        return await (self._twice if harmless else self._ask)("POST", path, body, timeout)

    async def close(self) -> None:
        """Close the connections."""
        for client in (self._client, self._unshared):
            with suppress(Exception):
                await client.aclose()

    async def _twice(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        try:
            return await self._ask(method, path, body, timeout)
        except LostConnection:
            return await self._ask(method, path, body, timeout, self._unshared)

    async def _ask(
        self, method: str, path: str, body: Any, timeout: float | None, client: httpx.AsyncClient | None = None
    ) -> Any:
        connect = min(timeout or self._timeout, _CONNECT_TIMEOUT)
        limits = httpx.Timeout(timeout, connect=connect)

        def send() -> asyncio.Task[httpx.Response]:
            return asyncio.ensure_future((client or self._client).request(method, path, json=body, timeout=limits))

        try:
            answer = await (send() if timeout is not None else self._patiently(send))
        except httpx.TimeoutException as error:
            unsent = isinstance(error, httpx.ConnectTimeout)
            raise ServerFault(f"no connection in {connect:g} s" if unsent else f"no answer in {timeout:g} s") from error
        except httpx.HTTPError as error:
            lost = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError | httpx.WriteError)
            kind = LostConnection if lost else ServerFault
            raise kind(f"{type(error).__name__}: {_one_line(str(error)) or 'connection lost'}") from error
        except RuntimeError as error:  # the client was closed in between
            raise ServerFault(_one_line(str(error))) from error
        if answer.status_code in _BUSY:
            raise ServerBusy(f"{answer.status_code} {_message(answer)}")
        if answer.status_code >= 500:
            raise ServerFault(f"{answer.status_code} {_message(answer)}", answer.status_code)
        if not answer.is_success:
            raise Refusal(_message(answer), answer.status_code)
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            if "json" not in answer.headers.get("content-type", ""):
                return answer.text
            raise ServerFault(f"answered with what is not JSON: {answer.text!r:.80}") from None

    async def _patiently(self, send: Callable[[], asyncio.Task[httpx.Response]]) -> httpx.Response:
        """Wait for the answer to one request as long as the server is well: a queue there is not its failure."""
        task = send()
        try:
            for _ in range(_LONGEST_WAIT):
                done, _ = await asyncio.wait({task}, timeout=self._timeout)
                unsent = bool(done) and isinstance(task.exception(), httpx.ConnectTimeout)
                if done and not unsent:
                    return task.result()
                what = f"no connection in {_CONNECT_TIMEOUT:g} s" if unsent else f"no answer in {self._timeout:g} s"
                try:
                    await self.get("/health", timeout=HEALTH_TIMEOUT)
                except (ServerFault, ServerBusy, Refusal) as error:
                    raise ServerFault(f"{what}, and it is not healthy ({error})") from None
                task = send() if unsent else task
            raise ServerFault(f"no answer in {_LONGEST_WAIT * self._timeout:g} s, although it is healthy")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def check_url(url: str) -> str:
    """Return the URL without a slash at its end.

    Raises:
        UsageError: It is no http URL.
    """
    if not is_http_url(url):
        raise UsageError(f"expected the URL of a server such as http://127.0.0.1:8000, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def is_http_url(url: str) -> bool:
    """Tell whether it is an http or https URL with a host."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _message(answer: Any) -> str:
    """Return the server's own words in one line."""
    text = answer.text
    with suppress(ValueError, AttributeError):
        body = json.loads(text)
        found = body.get("error", body.get("detail", body.get("message")))
        found = found.get("message", found) if isinstance(found, dict) else found
        text = found if isinstance(found, str) else json.dumps(found)
    wrapped = _WRAPPED.match(text.strip())
    return _one_line(wrapped["inner"] if wrapped else text) or "without a message"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + " ..."


class LoopThread:
    """A thread with an event loop, for callers that have none."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start `work` and return at once; cancelling the future cancels it."""
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(self._guard(work), self._loop)
        work.close()
        failed: Future[_T] = Future()
        settle(failed, error=EngineError("the engine was closed"))
        return failed

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Return the result of `work`."""
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting
            raise

    async def _guard(self, work: Coroutine[Any, Any, _T]) -> _T:
        try:
            return await work
        except asyncio.CancelledError:
            if self._closed:
                raise EngineError("the engine was closed") from None
            raise

    def stop(
        self,
        last: Coroutine[Any, Any, None],
        *,
        first: Callable[[], Awaitable[None]] | None = None,
        longest: float = 0.0,
    ) -> None:
        """Wait for `first`, which takes at most `longest` seconds; cancel what is under way, run `last`, end the thread."""
        with self._lock:
            if self._closed:
                last.close()
                return
            self._closed = True

        async def end() -> None:
            if first is not None:
                with suppress(Exception):
                    await first()
            me = asyncio.current_task()
            others = [task for task in asyncio.all_tasks() if task is not me]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await last

        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(timeout=longest + 30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        if not self._thread.is_alive():
            self._loop.close()
