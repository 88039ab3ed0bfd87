"""A retriever behind HTTP, in the form of ColBERT's server: GET /api/search?query=...&k=... answers

    {"topk": [{"pid": 7, "score": 21.5, "text": "Title | passage text"}, ...]}

where `title` may stand by itself. Failures that may pass (no connection, time-out, 429, 5xx) are tried again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from llmrl.errors import UsageError
from llmrl.leret.corpus import Corpus, fingerprint, normalise_title
from llmrl.leret.retriever import Hit, RetrieverError, check_query_batch
from llmrl.rollout.http import is_http_url

_PATH = "/api/search"
_TITLE_MARK = " | "
_LONGEST_PAUSE = 30.0


class HttpRetriever:
    """Client of one search server.

    Args:
        url: of the server, such as http://127.0.0.1:8893, or of its search path.
        name: of the server's index. The fingerprint then holds it in the place of the URL, so the same index may move to
            another address, and another index at the same address needs another name.
        corpus: where given, hits are matched to its passages by id, or else by title, and carry its ids and texts. What
            does not match stays under the server's id, and can be no gold document.
        timeout: seconds one answer may take.
        retries: further attempts after a failure that may pass.
        backoff: seconds before the first of them; doubles each time.
        parallel: requests under way at once.

    Raises:
        UsageError: the URL is none, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        corpus: Corpus | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        parallel: int = 8,
    ) -> None:
        if timeout <= 0 or retries < 0 or backoff < 0 or parallel < 1:
            raise UsageError(
                "expected timeout above 0, retries and backoff from 0, parallel from 1, got "
                f"timeout={timeout}, retries={retries}, backoff={backoff}, parallel={parallel}"
            )
        self.url, self.name = _search_url(url), name or "http"
        self._corpus, self._retries, self._backoff = corpus, retries, backoff
        index = {"kind": "http", "name": self.name} if name else {"kind": "http", "url": self.url, "name": "http"}
        self.fingerprint = fingerprint([index, None if corpus is None else corpus.fingerprint])
        # a proxy for the outside world does not lead to servers of ours
        self._client = httpx.Client(timeout=timeout, trust_env=False, limits=httpx.Limits(max_connections=parallel))
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="llmrl-search")

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return what the server finds, `parallel` requests at a time; a blank query is not sent. See `Retriever`.

        Raises:
            RetrieverError: the server failed to the last attempt, refused the request, or its answer has another form.
        """
        queries = check_query_batch(queries, k)
        asked = [self._pool.submit(self._search, query, k) if query.strip() else None for query in queries]
        try:
            return [future.result() if future is not None else [] for future in asked]
        except BaseException:
            for future in asked:
                if future is not None:
                    future.cancel()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.close()

    def _search(self, query: str, k: int) -> list[Hit]:
        body = self._ask(query, k)
        rows = body.get("topk") if isinstance(body, dict) else None
        if not isinstance(rows, list):
            raise self._error(query, f"expected an answer with a list 'topk', got {body!r:.200}")
        hits: dict[str, Hit] = {}
        for row in rows:
            hit = self._hit(row, query)
            hits.setdefault(hit.id, hit)
        return sorted(hits.values(), key=lambda hit: -hit.score)[:k]

    def _ask(self, query: str, k: int) -> Any:
        reason = ""
        for attempt in range(self._retries + 1):
            pause = self._backoff * 2 ** (attempt - 1) if attempt else 0.0
            time.sleep(min(pause, _LONGEST_PAUSE))
            try:
                answer = self._client.get(self.url, params={"query": query, "k": k})
            except httpx.TimeoutException:
                reason = f"no answer in {self._client.timeout.read:g} s"
                continue
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == 429 or answer.status_code >= 500:
                reason = f"status {answer.status_code} {' '.join(answer.text.split())[:200]}".rstrip()
                continue
            if not answer.is_success:
                raise self._error(query, f"status {answer.status_code} {' '.join(answer.text.split())[:200]}".rstrip())
            try:
                body = answer.json()
            except ValueError:
                raise self._error(query, f"expected JSON, got {answer.text!r:.200}") from None
            if isinstance(body, dict) and body.get("error") and "topk" not in body:
                reason = f"the server says {body.get('message', body['error'])!r:.200}"
                continue
            return body
        raise self._error(query, f"{reason} ({self._retries + 1} attempts); check that the server runs")

    def _hit(self, row: Any, query: str) -> Hit:
        score = row.get("score") if isinstance(row, Mapping) else None
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if score is None or not number or not isinstance(row.get("pid"), str | int):
            raise self._error(query, f"expected rows with 'pid' and a number as 'score', got {row!r:.200}")
        title, text = row.get("title"), str(row.get("text") or "")
        if title is None and _TITLE_MARK in text:
            title, _, text = text.partition(_TITLE_MARK)
        return self._matched(Hit(str(row["pid"]), str(title or ""), text, float(score)))

    def _matched(self, hit: Hit) -> Hit:
        if self._corpus is None:
            return hit
        title = normalise_title(hit.title)
        here = self._corpus.by_id.get(hit.id)
        if here is None or (title and normalise_title(here.title) != title):
            # the server numbers its passages in its own way: an equal id with another title is another passage
            same_title = [self._corpus.by_id[name] for name in self._corpus.by_title.get(title, ())]
            same_text = [passage for passage in same_title if passage.text.strip() == hit.text.strip()]
            taken = here is not None
            here = next(iter(same_text or same_title), None)
            if here is None:
                return Hit(f"{self.name}:{hit.id}", hit.title, hit.text, hit.score) if taken else hit
        return Hit(here.id, here.title, here.text, hit.score)

    def _error(self, query: str, reason: str) -> RetrieverError:
        return RetrieverError(f"retriever {self.name} at {self.url}, query {query!r:.100}: {reason}")


def _search_url(url: str) -> str:
    if not is_http_url(url):
        raise UsageError(f"expected the URL of a search server such as http://127.0.0.1:8893, got {url!r}")
    return url.rstrip("/") if httpx.URL(url).path not in ("", "/") else url.rstrip("/") + _PATH
