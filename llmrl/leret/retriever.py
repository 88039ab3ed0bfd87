"""The one protocol of retrievers, the checks around every call, and the way to open one by its kind.

A retriever takes a batch of queries and returns the hits of each, best first. No hit is an empty list. Whatever a retriever
returns goes through `retrieve`, which refuses what is not an answer and can leave out passages that were seen before.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmrl.errors import LlmrlError, UsageError, did_you_mean
from llmrl.leret.corpus import Corpus

KINDS = ("bm25", "dense", "hybrid", "http")


class RetrieverError(LlmrlError):
    """A retriever failed, returned what is not an answer, or found nothing most of the time."""


class NothingFoundError(RetrieverError):
    """Most searches came back empty: the retriever, or who writes the queries, is at fault."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One retrieved passage; a higher score is better, and scores of two queries or two retrievers do not compare."""

    id: str
    title: str
    text: str
    score: float


class Retriever(Protocol):
    """What every retriever is. It may be called from several threads at once.

    `fingerprint` covers the index, the settings and the corpus: equal fingerprints mean equal answers. Ties are broken by
    the order of the corpus.
    """

    @property
    def name(self) -> str:
        """Short name for tables and errors."""

    @property
    def fingerprint(self) -> str:
        """Identity of index, settings and corpus."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return for each query at most `k` hits, best first; an empty list where nothing was found."""


def check_query_batch(queries: Sequence[str], k: int) -> list[str]:
    """Return the queries as a list of texts that can be encoded.

    Raises:
        UsageError: one text instead of a batch, a query that is no text, or a k below 1.
    """
    if isinstance(queries, str):
        raise UsageError(f"expected a list of queries, got the text {queries!r:.60}; put it into a list")
    queries = list(queries)
    wrong = [query for query in queries if not isinstance(query, str)]
    if wrong:
        raise UsageError(f"expected queries that are texts, got {wrong[0]!r:.60}")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise UsageError(f"expected a whole number of passages from 1, got k={k!r}")
    # a model can write half of a surrogate pair, which no encoder, server or database takes
    return [query if query.isascii() else query.encode("utf-8", "replace").decode() for query in queries]


def retrieve(
    retriever: Retriever,
    queries: Sequence[str],
    k: int,
    *,
    seen: Sequence[Collection[str]] | None = None,
) -> list[list[Hit]]:
    """Search with every check.

    Args:
        retriever: any object with the protocol's members.
        queries: a batch; may be empty.
        k: hits a query at most; may exceed the corpus.
        seen: for each query ids that must not come back ("unseen passages only"); k others take their place.

    Returns:
        For each query at most k hits, best first, no id twice.

    Raises:
        UsageError: see `check_query_batch`; or `seen` is not as long as `queries`.
        RetrieverError: the retriever raised, or answered with what is no answer; retriever and query are named.
    """
    queries = check_query_batch(queries, k)
    without = [frozenset(ids) for ids in seen] if seen is not None else [frozenset[str]()] * len(queries)
    if len(without) != len(queries):
        raise UsageError(f"expected one set of seen ids a query ({len(queries)}), got {len(without)}")
    # how deep a query is asked depends on its own history alone, so that a cache gives the same answers in any batch
    depths: dict[int, list[int]] = {}
    for i, ids in enumerate(without):
        depths.setdefault(k + len(ids), []).append(i)
    results: list[list[Hit]] = [[] for _ in queries]
    for depth, rows in sorted(depths.items()):
        found = _ask(retriever, [queries[i] for i in rows], depth)
        for i, hits in zip(rows, found, strict=True):
            results[i] = _checked(retriever, queries[i], hits, without[i])[:k]
    return results


def _ask(retriever: Retriever, queries: list[str], k: int) -> list[list[Hit]]:
    try:
        found = retriever.search(queries, k)
    except LlmrlError:
        raise
    except Exception as error:
        query, error = _culprit(retriever, queries, k, error)
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise RetrieverError(
            f"retriever {retriever.name} failed on the query {query!r:.200}: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(found, Sequence) or len(found) != len(queries):
        came = f"{len(found)} lists" if isinstance(found, Sequence) else type(found).__name__
        first = queries[0] if queries else ""
        raise RetrieverError(
            f"retriever {retriever.name}: expected a list of hits for each of {len(queries)} queries (the first: "
            f"{first!r:.100}), got {came}"
        )
    return list(found)


def _culprit(retriever: Retriever, queries: list[str], k: int, error: Exception) -> tuple[str, Exception]:
    """Return the first query that fails by itself; when none does, the first of the batch."""
    for query in queries if len(queries) > 1 else []:
        try:
            retriever.search([query], k)
        except Exception as own:
            return query, own
    return queries[0] if queries else "", error


def _checked(retriever: Retriever, query: str, hits: Sequence[Hit], without: Collection[str]) -> list[Hit]:
    kept: list[Hit] = []
    ids: set[str] = set()
    for hit in hits:
        score = getattr(hit, "score", None)
        if not isinstance(getattr(hit, "id", None), str) or not isinstance(score, int | float) or math.isnan(score):
            raise RetrieverError(
                f"retriever {retriever.name}, query {query!r:.100}: expected hits with a text as id and a number as score, "
                f"got {hit!r:.100}"
            )
        if hit.id not in ids and hit.id not in without:
            ids.add(hit.id)
            kept.append(hit)
    return kept


class EmptyWatch:
    """Stops a run when most searches come back empty, for such a run trains on nothing.

    Every call counts, one with a query that was asked before too: a model that always writes the same empty query is seen.

    Args:
        share: of the last `calls` searches, how many may be empty; more of them raise.
        calls: searches to look back on; with fewer made, nothing is said before `finish`.
    """

    def __init__(self, *, share: float = 0.5, calls: int = 100) -> None:
        if not 0 <= share <= 1 or calls < 1:
            raise UsageError(f"expected a share in [0, 1] and at least 1 call, got share={share}, calls={calls}")
        self.share, self.calls = share, calls
        self.total = self.empty = self.blank_queries = 0
        self._recent: deque[bool] = deque(maxlen=calls)
        self._examples: deque[str] = deque(maxlen=3)
        self._name = ""
        self._lock = threading.Lock()

    def record(self, name: str, queries: Sequence[str], results: Sequence[Sequence[Hit]]) -> None:
        """Count a batch.

        Raises:
            NothingFoundError: more than `share` of the last `calls` searches were empty.
        """
        with self._lock:
            self._name = name
            for query, hits in zip(queries, results, strict=True):
                self.total += 1
                self._recent.append(not hits)
                if not hits:
                    self.empty += 1
                    self.blank_queries += not query.strip()
                    self._examples.append(query)
            if len(self._recent) == self.calls:
                self._stop_if_most_are_empty()

    def finish(self) -> None:
        """Look at a run that made fewer searches than `calls`.

        Raises:
            NothingFoundError: more than `share` of them were empty.
        """
        with self._lock:
            self._stop_if_most_are_empty()

    def _stop_if_most_are_empty(self) -> None:
        recent, empty = len(self._recent), sum(self._recent)
        if recent and empty > self.share * recent:
            examples = ", ".join(f"{query!r:.60}" for query in self._examples)
            raise NothingFoundError(
                f"{empty} of the last {recent} searches with {self._name} came back empty ({self.empty} of {self.total} in "
                f"all, {self.blank_queries} of them with a blank query), such as {examples}\n"
                "check that the retriever holds the right passages and that the model writes queries"
            )


def open_retriever(
    kind: str,
    corpus: Corpus,
    *,
    cache: Path | str | None = None,
    hybrid_of: Sequence[str] = ("bm25", "dense"),
    depth: int = 100,
    bm25: dict[str, Any] | None = None,
    dense: dict[str, Any] | None = None,
    http: dict[str, Any] | None = None,
) -> Retriever:
    """Open a retriever over a corpus.

    Args:
        kind: "bm25", "dense", "hybrid" or "http".
        corpus: the passages.
        cache: a file in which answers are kept, see `llmrl.leret.cache`; None keeps none.
        hybrid_of: of "hybrid", the kinds that are fused.
        depth: of "hybrid", how many hits of each are fused.
        bm25: arguments of `BM25Retriever`.
        dense: arguments of `DenseRetriever`; `encoder` is required.
        http: arguments of `HttpRetriever`; `url` is required.

    Raises:
        UsageError: an unknown kind, or a missing argument.
        VersionError: a package that this kind needs is not installed.
    """
    makers: dict[str, Callable[[], Retriever]] = {
        "bm25": lambda: _open_bm25(corpus, bm25 or {}),
        "dense": lambda: _open_dense(corpus, dense or {}),
        "http": lambda: _open_http(corpus, http or {}),
    }
    if kind not in KINDS:
        raise UsageError(f"unknown retriever {kind!r}{did_you_mean(kind, KINDS)}")
    if kind == "hybrid":
        from llmrl.leret.hybrid import HybridRetriever

        unknown = [part for part in hybrid_of if part not in makers]
        if unknown:
            raise UsageError(f"a hybrid cannot be made of {unknown[0]!r}{did_you_mean(unknown[0], makers)}")
        opened: Retriever = HybridRetriever([makers[part]() for part in hybrid_of], corpus, depth=depth)
    else:
        opened = makers[kind]()
    if cache is None:
        return opened
    from llmrl.leret.cache import CachedRetriever

    return CachedRetriever(opened, cache, corpus)


def _open_bm25(corpus: Corpus, options: dict[str, Any]) -> Retriever:
    from llmrl.leret.bm25 import BM25Retriever

    return BM25Retriever(corpus, **options)


def _open_dense(corpus: Corpus, options: dict[str, Any]) -> Retriever:
    from llmrl.leret.dense import DenseRetriever

    if not options.get("encoder"):
        raise UsageError("a dense retriever needs an encoder: name a folder such as one of sentence-transformers")
    return DenseRetriever(corpus, **options)


def _open_http(corpus: Corpus, options: dict[str, Any]) -> Retriever:
    from llmrl.leret.http_retriever import HttpRetriever

    if not options.get("url"):
        raise UsageError("an HTTP retriever needs the URL of its server, such as http://127.0.0.1:8893")
    return HttpRetriever(corpus=corpus, **options)
